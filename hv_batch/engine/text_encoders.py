"""The two text encoders (towers): convert prompts to the conditioning of the DiT.

    prompt --template, LLaMA tokenizer--> ids --LLaMA without its last two layers--> one state per token (content)
    prompt --CLIP tokenizer-------------> ids --CLIP text model--------------------> one pooled vector   (overall style)

Three rules must hold; breaking any of them changes every picture:

- The template is cropped from the states *after* the model has read it. Template and prompt are padded or truncated to
  351 tokens, for both templates. So 256 tokens are left for the prompt of a video, and 315 for that of an image.
- The states are the output of layer N - 2, without the final norm, so the last two layers are never loaded.
- A prompt is data. Braces and the text of special tokens inside a prompt have no special meaning.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hv_batch.architecture import (
    CLIP_TOKENS,
    IMAGE_TEMPLATE_TOKENS,
    PROMPT_TOKENS,
    SKIPPED_LAYERS,
    VIDEO_TEMPLATE_TOKENS,
)
from hv_batch.engine.checkpoint.tensor_files import open_file
from hv_batch.engine.checkpoint.text_files import TEXT_LAYOUT, missing_text_files, weight_file
from hv_batch.protocol import NonFiniteError, UserError


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """The text around a prompt, and the number of leading tokens to crop. The weights require this exact text."""

    head: str
    tail: str
    crop_start: int  # number of tokens of `head`, including the <|begin_of_text|> before it

    @property
    def max_tokens(self) -> int:
        """Tokens of prompt and `tail` that are left after the crop."""
        return PROMPT_TOKENS - self.crop_start


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
    crop_start=VIDEO_TEMPLATE_TOKENS,
)
IMAGE_TEMPLATE = _template(
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:",
    crop_start=IMAGE_TEMPLATE_TOKENS,
)


@dataclass(frozen=True, slots=True)
class TextEmbedding:
    """One encoded prompt, on the CPU, in the towers' dtype (satisfies `hv_batch.protocol.Embedding`).

    `num_tokens + tokens_lost` is the length of the prompt in LLaMA tokens. `states` has one more row than `num_tokens`,
    for the template's closing token, unless the prompt fills all rows.
    """

    states: (
        torch.Tensor
    )  # [valid tokens <= 256 or, for an image, 315, D], without padding, which does not change the result
    pooled: torch.Tensor  # [D2]
    num_tokens: int
    tokens_lost: int


class TextTowers:
    """Both text encoders, loaded (satisfies `hv_batch.protocol.TextEncoder`).

    `dtype` is that of LLaMA; `clip_dtype` is that of CLIP and defaults to `dtype`. The tokenizers are read from the
    towers' folders unless folders of their own are given. Raises UserError if a file or a weight is missing, or if the
    tokenizer splits the templates into another number of tokens than the crop assumes.
    """

    def __init__(
        self,
        llama_dir: Path,
        clip_dir: Path,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        clip_dtype: torch.dtype | None = None,
        llama_tokenizer: Path | None = None,
        clip_tokenizer: Path | None = None,
    ) -> None:
        llama_tokenizer, clip_tokenizer = llama_tokenizer or llama_dir, clip_tokenizer or clip_dir
        if missing := missing_text_files(llama_dir, clip_dir, llama_tokenizer, clip_tokenizer):
            raise UserError(
                f"The text encoders cannot be loaded: {'; '.join(missing)}. The expected layout is:\n{TEXT_LAYOUT}"
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
        """Build from models in memory. `llama` must have neither the unused last layers nor the final norm."""
        towers = cls.__new__(cls)
        towers._llama_tokenizer, towers._clip_tokenizer = llama_tokenizer, clip_tokenizer
        towers._heads = {t: towers._head_ids(t, Path("memory")) for t in (VIDEO_TEMPLATE, IMAGE_TEMPLATE)}
        towers._llama, towers._clip, towers._device = llama, clip, device
        return towers

    # no_grad instead of inference_mode, because inference tensors cannot be used in a training step.
    @torch.no_grad()
    def encode(self, prompts: Sequence[str], *, image: bool) -> list[TextEmbedding]:
        """Return one embedding per prompt, in order. Equal prompts share one embedding.

        White space around a prompt is stripped. `image` selects the image template. Raises NonFiniteError if an
        embedding is not finite.

        P3: every distinct prompt runs alone, padded to one fixed shape. Matrix kernels are chosen by shape, so in a
        batch the bits of a prompt would depend on the number of other prompts. Encoding takes about 0.1 s of a 300 s
        render, so batching would save little.
        """
        template = IMAGE_TEMPLATE if image else VIDEO_TEMPLATE
        stripped = [prompt.strip() for prompt in prompts]
        distinct = {prompt: self._encode_one(prompt, template) for prompt in dict.fromkeys(stripped)}
        return [distinct[prompt] for prompt in stripped]

    def _encode_one(self, prompt: str, template: PromptTemplate) -> TextEmbedding:
        prompt_ids = self._plain_ids(prompt)
        # Truncated as in the release: the whole text is cut once, so a long prompt loses its end and the closing token.
        ids = (self._heads[template] + prompt_ids + self._template_ids(template.tail))[:PROMPT_TOKENS]
        lost = max(0, len(prompt_ids) - template.max_tokens)
        # copy=True, because a slice would keep and pickle the whole padded buffer.
        states = self._llama_states(ids)[template.crop_start : len(ids)].to("cpu", copy=True)
        pooled = self._clip_pooled(prompt)
        _require_finite(states, "the text states of LLaMA are")
        _require_finite(pooled, "the pooled vector of CLIP is")
        return TextEmbedding(states, pooled, num_tokens=len(prompt_ids) - lost, tokens_lost=lost)

    def _llama_states(self, ids: list[int]) -> torch.Tensor:
        """Return the states [PROMPT_TOKENS, D] of `ids`, padded on the right."""
        padding = PROMPT_TOKENS - len(ids)
        pad_id = self._llama_tokenizer.pad_token_id or 0  # any id works, because the mask hides it
        ids_BL = torch.tensor([ids + [pad_id] * padding], device=self._device)  # noqa: N806
        mask_BL = torch.tensor([[1] * len(ids) + [0] * padding], device=self._device)  # noqa: N806
        return self._llama(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).last_hidden_state[0]

    def _clip_pooled(self, prompt: str) -> torch.Tensor:
        """Return the pooled vector [D2] of the prompt without template, truncated to 77 tokens."""
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

    # Head, prompt and tail are tokenized separately, so that only the special tokens of the template act as special
    # tokens. The released code tokenizes the joined text. Both give the same ids, because no token can span a boundary:
    # the tail is a special token, and the head ends in a special token followed by "\n\n", which the tokenizer's split
    # pattern separates from any character that is not white space. The prompt is stripped, so it neither starts nor
    # ends with white space. (Otherwise "\n\n" + "\nA cat" would contain one token of three newlines.)

    def _plain_ids(self, text: str) -> list[int]:
        """Tokenize text as plain text: no part of it is read as a special token."""
        return self._ids(text, add_special_tokens=False, split_special_tokens=True)

    def _template_ids(self, text: str) -> list[int]:
        return self._ids(text, add_special_tokens=False, split_special_tokens=False)

    def _head_ids(self, template: PromptTemplate, llama_dir: Path) -> list[int]:
        ids = self._ids(template.head, add_special_tokens=True, split_special_tokens=False)
        if len(ids) != template.crop_start:
            raise UserError(
                f"The tokenizer in {llama_dir} splits the template before the prompt into {len(ids)} tokens, but the "
                f"model was trained with {template.crop_start}, so the template would be cropped at the wrong token. "
                "Copy the tokenizer files of llava-llama-3-8b-v1_1, which adds <|begin_of_text|>, into this folder."
            )
        return ids

    def _ids(self, text: str, *, add_special_tokens: bool, split_special_tokens: bool) -> list[int]:
        return self._llama_tokenizer(
            text,
            add_special_tokens=add_special_tokens,
            split_special_tokens=split_special_tokens,
            verbose=False,  # suppresses the warning about long prompts, which `tokens_lost` reports
        ).input_ids


def _require_finite(values: torch.Tensor, what: str) -> None:
    """Raise NonFiniteError here, where the cause is known: the DiT would only turn NaN into NaN."""
    if not bool(torch.isfinite(values).all()):
        dtype = str(values.dtype).removeprefix("torch.")
        raise NonFiniteError(f"{what} not finite: {dtype} of the text encoder overflowed, or its weights are damaged")


# transformers takes seconds to import, so the functions that need it import it.


def _load_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _load_llama(directory: Path, dtype: torch.dtype) -> nn.Module:
    """Load the decoder stack up to layer N - 2: hidden_states[-3] of the full model with 94 % of its weights."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if config.model_type != "llama":
        raise UserError(
            f"{directory / 'config.json'} describes a model of type {config.model_type!r}; allowed is 'llama'. From a "
            "LLaVA checkpoint, extract the language model first: `hv-batch weights extract-text-encoder`."
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
    open_file(file)  # raises a clearer error than transformers if the file is damaged
    model, loading = model_class.from_pretrained(
        directory,
        dtype=dtype,
        attn_implementation="sdpa",  # fixed, so that other installed packages do not change the bits
        local_files_only=True,
        trust_remote_code=False,
        weights_only=True,
        output_loading_info=True,
        **kwargs,
    )
    # Extra weights are expected (skipped layers, heads, CLIP's image tower). Missing weights would stay random.
    if missing := sorted(loading["missing_keys"]):
        raise UserError(
            f"The weights in {directory} lack {len(missing)} tensors (the first is {missing[0]!r}): they belong to "
            f"another model or are incomplete. Copy the files again. The expected layout is:\n{TEXT_LAYOUT}"
        )
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the library's progress bars and loading report, which warns about the intentionally skipped weights."""
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
