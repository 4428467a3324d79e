"""The two text towers: prompts in, conditioning for the DiT out (spec section 3).

    prompt --template, LLaMA tokenizer--> ids --LLaMA without its last two layers--> one state a token   (what to draw)
    prompt --CLIP tokenizer-------------> ids --CLIP text model--------------------> one pooled vector   (overall style)

Three things are easy to get wrong, and change every picture when they are:

- the template is cut off *after* the model has read it, and the limit of 256 tokens counts from that cut;
- the state wanted is the output of layer N - 2, without the final norm: so the last two layers are never loaded;
- a prompt is data. Braces, or the text of a special token, inside a prompt must mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hv_batch.architecture import MAX_TEXT_TOKENS, SKIPPED_LAYERS
from hv_batch.engine.checkpoint.tensor_files import open_file
from hv_batch.engine.checkpoint.text_files import TEXT_LAYOUT, missing_text_files, weight_file
from hv_batch.protocol import UserError

CLIP_TOKENS = 77  # the position table of CLIP ViT-L/14


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """Text around a prompt, part of the weights' contract byte for byte, and how many tokens are cut in front."""

    head: str
    tail: str
    crop_start: int  # tokens of `head`, the <|begin_of_text|> before it included


def _template(instruction: str, crop_start: int) -> PromptTemplate:
    head = (
        f"<|start_header_id|>system<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n"
    )
    return PromptTemplate(head, "<|eot_id|>", crop_start)


VIDEO_TEMPLATE = _template(
    "Describe the video by detailing the following aspects: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:",
    crop_start=95,
)
IMAGE_TEMPLATE = _template(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    crop_start=36,
)


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt, on the CPU, in the towers' dtype. Satisfies `hv_batch.protocol.Embedding`.

    `num_tokens + tokens_lost` is the length of the prompt in LLaMA tokens. `states` has one row more than `num_tokens`
    unless the prompt fills all 256 places: the template's closing token, which the DiT sees as well.
    """

    states: torch.Tensor  # [valid tokens <= 256, D]; padding is dropped, which is exact (spec section 2)
    pooled: torch.Tensor  # [D2]
    num_tokens: int
    tokens_lost: int


class TextTowers:
    """Both towers, loaded and ready. Satisfies `hv_batch.protocol.TextEncoder`.

    Raises UserError when a file is missing, a weight is missing from the files, or the tokenizer does not cut the
    templates into the number of tokens that the crop assumes.
    """

    def __init__(
        self,
        llama_dir: Path,
        clip_dir: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        clip_dtype: torch.dtype | None = None,  # None: as the LLaMA tower
        llama_tokenizer: Path | None = None,
        clip_tokenizer: Path | None = None,
    ) -> None:
        llama_tokenizer, clip_tokenizer = llama_tokenizer or llama_dir, clip_tokenizer or clip_dir
        if found := missing_text_files(llama_dir, clip_dir, llama_tokenizer, clip_tokenizer):
            raise UserError(
                f"The text encoders cannot be loaded: {'; '.join(found)}. The expected layout is:\n{TEXT_LAYOUT}"
            )
        with _quiet_transformers():
            self._llama_tokenizer = _load_tokenizer(llama_tokenizer)
            self._clip_tokenizer = _load_tokenizer(clip_tokenizer)
            self._heads = {t: self._head_ids(t, llama_tokenizer) for t in (VIDEO_TEMPLATE, IMAGE_TEMPLATE)}
            self._llama = _load_llama(llama_dir, dtype).to(device)
            self._clip = _load_clip(clip_dir, clip_dtype or dtype).to(device)
        self._device = device

    @classmethod
    def of_models(
        cls, llama_tokenizer: Any, llama: nn.Module, clip_tokenizer: Any, clip: nn.Module, device: torch.device
    ) -> TextTowers:
        """Towers that are in memory already; `llama` without the layers that are not used, and without final norm."""
        towers = cls.__new__(cls)
        towers._llama_tokenizer, towers._clip_tokenizer = llama_tokenizer, clip_tokenizer
        towers._heads = {t: towers._head_ids(t, Path("memory")) for t in (VIDEO_TEMPLATE, IMAGE_TEMPLATE)}
        towers._llama, towers._clip, towers._device = llama, clip, device
        return towers

    # no_grad rather than inference_mode: inference tensors could never feed a training step.
    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, image: bool) -> list[TextEmbedding]:
        """One embedding a prompt, in order; equal prompts share one. Blanks around a prompt are not part of it.

        P3: every distinct prompt runs alone, padded to one fixed shape. Matrix kernels are chosen by shape, so in a
        true batch a prompt's bits would depend on how many others happened to arrive with it. Text is about 0.1 s of
        a 300 s render; it does not need the batch.
        """
        template = IMAGE_TEMPLATE if image else VIDEO_TEMPLATE
        stripped = [prompt.strip() for prompt in prompts]
        distinct = {prompt: self._encode_one(prompt, template) for prompt in dict.fromkeys(stripped)}
        return [distinct[prompt] for prompt in stripped]

    def _encode_one(self, prompt: str, template: PromptTemplate) -> TextEmbedding:
        prompt_ids = self._plain_ids(prompt)
        limit = template.crop_start + MAX_TEXT_TOKENS
        # Truncated as released: one cut through the whole text, so a long prompt loses its end and the closing token.
        ids = (self._heads[template] + prompt_ids + self._template_ids(template.tail))[:limit]
        lost = max(0, len(prompt_ids) - MAX_TEXT_TOKENS)
        # copy: a slice would keep, and pickle, the whole padded buffer.
        states = self._llama_states(ids, limit)[template.crop_start : len(ids)].to("cpu", copy=True)
        return TextEmbedding(states, self._clip_pooled(prompt), num_tokens=len(prompt_ids) - lost, tokens_lost=lost)

    def _llama_states(self, ids: list[int], length: int) -> torch.Tensor:
        """States [length, D] of `ids` padded on the right."""
        padding = length - len(ids)
        pad_id = self._llama_tokenizer.pad_token_id or 0  # any id will do: the mask hides it
        ids_BL = torch.tensor([ids + [pad_id] * padding], device=self._device)  # noqa: N806
        mask_BL = torch.tensor([[1] * len(ids) + [0] * padding], device=self._device)  # noqa: N806
        return self._llama(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state[0]

    def _clip_pooled(self, prompt: str) -> torch.Tensor:
        """The pooled vector [D2] of the bare prompt; what exceeds 77 tokens is cut."""
        encoded = self._clip_tokenizer(
            prompt,
            max_length=CLIP_TOKENS,
            truncation=True,
            padding="max_length",
            split_special_tokens=True,
            return_tensors="pt",
        ).to(self._device)
        output = self._clip(input_ids=encoded.input_ids, attention_mask=encoded.attention_mask)
        return output.pooler_output[0].to("cpu", copy=True)

    # Head, prompt and tail are tokenized apart, so that only the template's special tokens act as such. This gives the
    # ids of the released code, which tokenizes the joined text, because no piece can span a seam: the tail is a special
    # token, and the head ends in one followed by "\n\n", which the tokenizer's split pattern closes off before any
    # character that is not white space. A prompt is stripped, so it begins with none. (Unstripped, "\n\n" + "\nA cat"
    # would be one piece of three newlines.) Blanks at a prompt's end are gone for the same reason.

    def _plain_ids(self, text: str) -> list[int]:
        """Ids of text in which nothing is a special token."""
        return self._ids(text, add_special_tokens=False, split_special_tokens=True)

    def _template_ids(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False, split_special_tokens=False)

    def _head_ids(self, template: PromptTemplate, llama_dir: Path) -> list[int]:
        ids = self._ids(template.head, add_special_tokens=True, split_special_tokens=False)
        if len(ids) != template.crop_start:
            raise UserError(
                f"The tokenizer in {llama_dir} cuts the text in front of every prompt into {len(ids)} tokens, but the "
                f"model was trained with {template.crop_start}, so prompts would be cut at the wrong place. Allowed is "
                "the tokenizer of llava-llama-3-8b-v1_1 with its <|begin_of_text|>; copy its tokenizer files there."
            )
        return ids

    def _ids(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        return self._llama_tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            verbose=False,  # else long prompts warn; `tokens_lost` reports them
        ).input_ids


# transformers takes seconds to import, and `missing_text_files` does without: so it is imported where it is used.


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _load_llama(directory: Path, dtype: torch.dtype) -> nn.Module:
    """The decoder stack up to layer N - 2: equal to hidden_states[-3] of the full model, at 94 % of its weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.model_type != "llama":
        raise UserError(
            f"{directory / 'config.json'} describes a model of type {config.model_type!r}; allowed is 'llama'. From a "
            "LLaVA checkpoint, extract the language model and its tokenizer into that directory first."
        )
    config.num_hidden_layers -= SKIPPED_LAYERS
    model = _load_weights(AutoModel, directory, dtype, config=config)
    model.norm = nn.Identity()
    return model


def _load_clip(directory: Path, dtype: torch.dtype) -> nn.Module:
    from transformers import CLIPTextModel

    return _load_weights(CLIPTextModel, directory, dtype)


def _load_weights(model_class: Any, directory: Path, dtype: torch.dtype, **kwargs: Any) -> Any:
    file = weight_file(directory)
    assert file is not None
    open_file(file)  # says better than transformers what is wrong with a damaged one
    model, loading = model_class.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="sdpa",  # pinned: what else is installed must not change the bits
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        output_loading_info=True,
        **kwargs,
    )
    # Surplus weights are expected (skipped layers, heads, CLIP's image tower). A missing one would be left random.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"The weights in {directory} lack {len(missing)} tensors, the first of them {missing[0]!r}, so they are of "
            f"another model or incomplete. Copy the files again. The expected layout is:\n{TEXT_LAYOUT}"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Hide the library's bars and loading report, which warns of the very weights that are left out on purpose."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
