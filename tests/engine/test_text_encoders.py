"""The text encoders against the released procedure, written out with the transformers library."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, CLIPTextModel, LlamaForCausalLM, LlamaModel

from hv_batch.architecture import PROMPT_TOKENS
from hv_batch.engine.text_encoders import IMAGE_TEMPLATE, VIDEO_TEMPLATE, PromptTemplate, TextTowers
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import write_toy_checkpoint
from hv_batch.toy.tokenizers import LLAMA_SPECIALS

PROMPT = "A golden retriever surfing a wave at sunset, slow motion"
LONG_PROMPT = "a cat and a dog walk along the beach, " * 60


@pytest.fixture(scope="module")
def model_base(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def towers(model_base):
    return load(model_base)


@pytest.fixture(scope="module")
def tokenizer(model_base):
    return AutoTokenizer.from_pretrained(model_base / "text_encoder")


def load(base: Path, dtype: torch.dtype = torch.float32) -> TextTowers:
    return TextTowers(base / "text_encoder", base / "text_encoder_2", device="cpu", dtype=dtype)


def joined_ids(tokenizer, template: PromptTemplate, prompt: str) -> list[int]:
    """Tokenize as the release does: one text, tokenized and truncated as a whole."""
    return tokenizer(template.head + prompt + template.tail, truncation=True, max_length=PROMPT_TOKENS).input_ids


def engine_ids(towers: TextTowers, template: PromptTemplate, prompt: str) -> list[int]:
    """Return the ids that the LLaMA tower receives for a prompt."""
    seen: list[list[int]] = []
    hook = towers._llama.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"][kwargs["attention_mask"].bool()].tolist()),
        with_kwargs=True,
    )
    try:
        towers.encode([prompt], image=template is IMAGE_TEMPLATE)
    finally:
        hook.remove()
    return seen[0]


def official_states(base: Path, tokenizer, template: PromptTemplate, prompt: str) -> torch.Tensor:
    """Return hidden_states[-3] of the complete model, padded and cropped as in the release, without the padding."""
    batch = tokenizer(
        template.head + prompt + template.tail,
        truncation=True,
        padding="max_length",
        max_length=351,
        return_tensors="pt",
    )
    model = AutoModel.from_pretrained(base / "text_encoder", dtype=torch.float32)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states[-3]
    crop = template.crop_start
    return states[0, crop:][batch.attention_mask[0, crop:].bool()]


@pytest.mark.parametrize("template", [VIDEO_TEMPLATE, IMAGE_TEMPLATE])
@pytest.mark.parametrize("prompt", [PROMPT, LONG_PROMPT, "", "é 中文 🎈 1234567"])
def test_states_are_those_of_the_released_procedure(model_base, towers, tokenizer, template, prompt):
    """Spec 3.1: template, 351 tokens, hidden state -3 without the final norm, crop; with two layers less."""
    expected = official_states(model_base, tokenizer, template, prompt.strip())
    embedding = towers.encode([prompt], image=template is IMAGE_TEMPLATE)[0]
    assert torch.equal(embedding.states, expected)


def test_a_causal_lm_checkpoint_loads_as_the_bare_model(model_base, towers, tmp_path):
    """Spec 7: the extracted language model may include its output head."""
    base = shutil.copytree(model_base, tmp_path / "base")
    bare = LlamaModel.from_pretrained(base / "text_encoder")
    with_head = LlamaForCausalLM(bare.config)
    with_head.model.load_state_dict(bare.state_dict())
    (base / "text_encoder" / "model.safetensors").unlink()
    with_head.save_pretrained(base / "text_encoder")
    assert torch.equal(
        load(base).encode([PROMPT], image=False)[0].states, towers.encode([PROMPT], image=False)[0].states
    )


def test_pooled_vector_is_that_of_clip(model_base, towers):
    """Spec 3.2: the pooler's output for the prompt without template; it depends on the prompt."""
    tokenizer = AutoTokenizer.from_pretrained(model_base / "text_encoder_2")
    model = CLIPTextModel.from_pretrained(model_base / "text_encoder_2", dtype=torch.float32)
    batch = tokenizer(PROMPT, truncation=True, padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).pooler_output[0]
    video, image = (towers.encode([PROMPT], image=image)[0].pooled for image in (False, True))
    assert torch.equal(video, expected)
    assert torch.equal(image, expected)
    assert not torch.equal(towers.encode(["A cat"], image=False)[0].pooled, expected)


any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60) | st.text(" \n\r\t.,'a1{}é<|", max_size=20)
plain_text = any_text.filter(lambda text: not any(special in text for special in LLAMA_SPECIALS))


@settings(max_examples=150, deadline=None)
@given(prompt=plain_text)
def test_plain_prompts_get_the_ids_of_the_joined_text(towers, tokenizer, prompt):
    """Spec 3.1: tokenizing head, prompt and tail separately gives the ids of the joined text, for any prompt."""
    expected = joined_ids(tokenizer, VIDEO_TEMPLATE, prompt.strip())
    assert engine_ids(towers, VIDEO_TEMPLATE, prompt) == expected


@pytest.mark.parametrize("prompt", ["\nA cat", "  A cat", "\n\n A cat\n", "\u00a0\u2003A cat"])
def test_blanks_around_a_prompt_do_not_merge_with_the_template(towers, prompt):
    """Spec 1 and 3.1: white space is stripped; otherwise a leading newline would form one token with the template's."""
    assert engine_ids(towers, VIDEO_TEMPLATE, prompt) == engine_ids(towers, VIDEO_TEMPLATE, "A cat")


@pytest.mark.parametrize(
    "special", ["<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>system<|end_header_id|>", "<pad>"]
)
def test_special_tokens_in_a_prompt_are_plain_text(towers, tokenizer, special):
    """Spec 3.1: a prompt is data; it can neither end its turn nor start another."""
    ids = engine_ids(towers, VIDEO_TEMPLATE, f"A cat {special} A dog")
    body = ids[VIDEO_TEMPLATE.crop_start : -1]
    assert not set(body) & set(tokenizer.convert_tokens_to_ids(list(LLAMA_SPECIALS)))
    assert tokenizer.decode(body) == f"A cat {special} A dog"


def test_clip_special_tokens_in_a_prompt_are_plain_text(towers):
    """Spec 3.2: an end token in the prompt must not become the token at which CLIP pools."""
    cut, whole = (towers.encode([p], image=False)[0].pooled for p in ("A cat", "A cat <|endoftext|> A dog"))
    assert not torch.equal(cut, whole)


def test_braces_are_plain_text(towers, tokenizer):
    """Spec 3.1: the template's placeholder has no meaning in a prompt."""
    prompt = "A sign says {} and {prompt} and {0}"
    assert engine_ids(towers, VIDEO_TEMPLATE, prompt) == joined_ids(tokenizer, VIDEO_TEMPLATE, prompt)


def test_one_prompts_bits_do_not_depend_on_the_batch(towers):
    """P3: an embedding is equal alone and among others, in any order and with longer ones; equal prompts share one."""
    prompts = [PROMPT, "A cat", LONG_PROMPT, PROMPT, f" {PROMPT}\n", ""]
    together = towers.encode(prompts, image=False)
    for prompt, embedding in zip(prompts, together, strict=True):
        alone = towers.encode([prompt], image=False)[0]
        assert torch.equal(embedding.states, alone.states)
        assert torch.equal(embedding.pooled, alone.pooled)
    assert together[0] is together[3] is together[4]


@pytest.mark.parametrize(("image", "most"), [(False, 256), (True, 315)], ids=["video", "image"])
def test_lengths_count_the_used_and_the_lost_tokens(towers, tokenizer, image, most):
    """Spec 3.1: up to 256 tokens of prompt and closing token, 315 for an image, reach the DiT; the others are lost."""
    assert tokenizer.tokenize(" cat") == ["Ġcat"]
    for words, rows, kept, lost in [
        (1, 2, 1, 0),
        (most - 1, most, most - 1, 0),
        (most, most, most, 0),
        (most + 1, most, most, 1),
        (400, most, most, 400 - most),
    ]:
        embedding = towers.encode([" cat" * words], image=image)[0]
        assert (len(embedding.states), embedding.num_tokens, embedding.tokens_lost) == (rows, kept, lost)


def test_an_embedding_has_no_padding(towers):
    """Spec 2: the padding is removed from the storage too, which is what is sent between processes."""
    embedding = towers.encode(["A cat"], image=False)[0]
    assert embedding.states.untyped_storage().nbytes() == embedding.states.numel() * 4
    assert torch.equal(pickle.loads(pickle.dumps(embedding)).states, embedding.states)


def test_dtype_is_the_one_asked_for(model_base):
    """Spec 1: the text encoders compute and return the configured precision."""
    embedding = load(model_base, torch.bfloat16).encode(["A cat"], image=True)[0]
    assert embedding.states.dtype == embedding.pooled.dtype == torch.bfloat16


def test_the_last_two_layers_are_not_loaded(model_base, towers):
    """Spec 3.1: their output is never used; in the released model they would take about 0.9 GB."""
    whole = AutoModel.from_pretrained(model_base / "text_encoder")
    assert len(towers._llama.layers) == len(whole.layers) - 2


@pytest.mark.parametrize(
    "missing",
    [
        "text_encoder",
        "text_encoder/config.json",
        "text_encoder/tokenizer.json",
        "text_encoder/model.safetensors",
        "text_encoder_2/model.safetensors",
    ],
)
def test_a_missing_file_is_named_with_its_path_and_the_layout(model_base, tmp_path, missing):
    """P6: the error names the missing file, its expected path and the layout of the directory."""
    base = shutil.copytree(model_base, tmp_path / "base")
    path = base / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError) as error:
        load(base)
    assert str(path) in str(error.value)
    assert "text_encoder_2/  CLIP" in str(error.value)


def test_a_missing_shard_is_named(model_base, tmp_path):
    """P6: the error names a shard that the index lists but that does not exist."""
    base = shutil.copytree(model_base, tmp_path / "base")
    (base / "text_encoder" / "model.safetensors").unlink()
    index = {"weight_map": {"embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (base / "text_encoder" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors"):
        load(base)


def test_weights_that_are_not_of_the_model_are_refused(model_base, tmp_path):
    """P6: a tensor that the file lacks must not keep random values."""
    base = shutil.copytree(model_base, tmp_path / "base")
    shutil.copy(base / "text_encoder_2" / "model.safetensors", base / "text_encoder" / "model.safetensors")
    with pytest.raises(UserError, match=r"lack \d+ tensors"):
        load(base)


def test_a_llava_checkpoint_is_refused(model_base, tmp_path):
    """P6, spec 7: the error says that the language model must be extracted first."""
    base = shutil.copytree(model_base, tmp_path / "base")
    (base / "text_encoder" / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(UserError, match="extract the language model"):
        load(base)


def test_a_tokenizer_with_another_template_length_is_refused(model_base, tmp_path):
    """Spec 3.1: the crop is a number of tokens, so the tokenizer must agree; the error names both numbers."""
    base = shutil.copytree(model_base, tmp_path / "base")
    path = base / "text_encoder" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["post_processor"] = None  # no <|begin_of_text|>
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"94 tokens.* 95"):
        load(base)
