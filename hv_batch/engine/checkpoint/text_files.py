"""The files of the text encoders in a checkpoint tree."""

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
    """Return one sentence for each missing file; empty if the directories are complete. Reads no weights.

    The tokenizers are expected beside the weights unless their directories are given, as in the layout of diffusers.
    """
    clip_files = [("tokenizer.json",), ("vocab.json", "merges.txt")]
    return [
        *_missing(llama_dir, llama_tokenizer or llama_dir, "the LLaMA text encoder", [("tokenizer.json",)]),
        *_missing(clip_dir, clip_tokenizer or clip_dir, "the CLIP text encoder", clip_files),
    ]


def weight_file(directory: Path) -> Path | None:
    """Return the weight file of a text encoder, or the index of its shards, with transformers' precedence; or None."""
    return next((directory / name for name in _WEIGHTS if (directory / name).is_file()), None)


def _missing(directory: Path, tokenizer: Path, what: str, tokenizers: list[tuple[str, ...]]) -> list[str]:
    if not directory.is_dir():
        return [f"{what} is expected in the directory {directory}, which does not exist"]
    missing = []
    required = (directory / "config.json", tokenizer / "tokenizer_config.json")
    missing += [f"{what} lacks {path}" for path in required if not path.is_file()]
    if not any(all((tokenizer / name).is_file() for name in names) for names in tokenizers):
        missing.append(f"{what} lacks its tokenizer: {tokenizer / tokenizers[0][0]}")
    weights = weight_file(directory)
    if weights is None:
        return [*missing, f"{what} lacks its weights: {directory / _WEIGHTS[0]}"]
    try:
        shards = shard_files(weights)
    except UserError as error:
        return [*missing, str(error)]
    return missing + [f"{what} lacks {shard}, which its index names" for shard in shards if not shard.is_file()]
