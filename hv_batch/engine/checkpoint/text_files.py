"""The files of a text encoder in a checkpoint tree."""

from __future__ import annotations

from pathlib import Path

from hv_batch.engine.checkpoint.tensor_files import shard_files
from hv_batch.protocol import UserError

TEXT_LAYOUT = """\
text_encoder/    LLaMA: config.json, tokenizer.json, model.safetensors (or shards with their index)
text_encoder_2/  CLIP: config.json, tokenizer.json (or vocab.json + merges.txt), model.safetensors"""


_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def missing_text_files(
    llama_dir: Path, clip_dir: Path, llama_tokenizer: Path | None = None, clip_tokenizer: Path | None = None
) -> list[str]:
    """What is missing from the directories, one sentence each; reads no weights.

    The tokenizers lie beside the weights unless directories of their own are given, as in diffusers' layout.
    """
    clip_files = [("tokenizer.json",), ("vocab.json", "merges.txt")]
    return [
        *_missing(llama_dir, llama_tokenizer or llama_dir, "the LLaMA text encoder", [("tokenizer.json",)]),
        *_missing(clip_dir, clip_tokenizer or clip_dir, "the CLIP text encoder", clip_files),
    ]


def weight_file(directory: Path) -> Path | None:
    """The file of a tower's weights, or the index of its shards, in transformers' order of choice."""
    return next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)


def _missing(directory: Path, tokenizer: Path, what: str, tokenizers: list[tuple[str, ...]]) -> list[str]:
    if not directory.is_dir():
        return [f"{what} is expected in the directory {directory}, which does not exist"]
    found = []
    required = (directory / "config.json", tokenizer / "tokenizer_config.json")
    found += [f"{what} lacks {path}" for path in required if not path.is_file()]
    if not any(all((tokenizer / name).is_file() for name in names) for names in tokenizers):
        found.append(f"{what} lacks its tokenizer: {tokenizer / tokenizers[0][0]}")
    weights = weight_file(directory)
    if weights is None:
        return [*found, f"{what} lacks its weights: {directory / _WEIGHTS[0]}"]
    try:
        shards = shard_files(weights)
    except UserError as error:
        return [*found, str(error)]
    return found + [f"{what} lacks {shard}, named in its index" for shard in shards if not shard.is_file()]
