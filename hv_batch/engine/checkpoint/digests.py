"""Which weights these are: digests of the files that a checkpoint tree would load (promises P2 and P3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.tensor_files import shard_files
from hv_batch.engine.checkpoint.tree import LAYOUT, CheckpointTree, scales_file
from hv_batch.protocol import UserError

Files = Iterable[tuple[str, str, Path]]  # part, name in it, path

# What the text towers may read from their folders. A README or a downloader's notes do not change a picture.
_TEXT_TOWER_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"})

# Below this a file is digested whole. Above, 2048 blocks of 8 KiB spread evenly over it are: 16 MiB a file keep the
# digest of the released 40 GB tree at seconds, and in none of its files is a block's matrix so small that it would lie
# between two of them. So weights that were merged into a single layer are other weights.
_DIGEST_WHOLE_BELOW = 16 * 2**20
_DIGEST_BLOCKS = 2048
_DIGEST_BLOCK = 8 * 2**10


def revision(tree: CheckpointTree) -> dict[str, str]:
    """A digest, 64 hex digits, of each part of what this tree would load (promise P3): "dit", "vae", and the folders of
    the text towers and tokenizers.

    Covers each file's role, name and size, all bytes of a file below 16 MiB, and of a larger one 2048 evenly spread
    blocks of 8 KiB, its first and last among them. So it notices another, retrained, merged, re-cast or truncated
    checkpoint, but not a few changed bytes between two blocks of a large file: it is no proof against bit rot or a
    forger. It depends neither on where the tree lies nor on file times. Raises UserError when a file is missing.
    """
    if missing := tree.missing():
        raise UserError("The model is not complete: " + " | ".join([*missing, LAYOUT]))
    return _digests([*_dit_files(tree), *_vae_files(tree), *_text_files(tree)])


def vae_revision(tree: CheckpointTree) -> dict[str, str]:
    """That of the VAE alone, from which latents are decoded; the rest of the tree need not be there."""
    return _digests(_vae_files(tree))


def digest_file(digest: Any, name: str, path: Path) -> None:
    """Add a file to a hashlib digest: `name`, its size, and its bytes or blocks of them, as `revision` says."""
    size = path.stat().st_size
    digest.update(f"{name}\0{size}\0".encode())
    with path.open("rb") as file:
        for offset, length in _digest_blocks(size):
            file.seek(offset)
            digest.update(file.read(length))


def _digests(files: Files) -> dict[str, str]:
    digests: dict[str, Any] = {}
    for part, name, path in files:
        digest_file(digests.setdefault(part, hashlib.sha256()), name, path)
    return {part: digest.hexdigest() for part, digest in digests.items()}


def _dit_files(tree: CheckpointTree) -> Files:
    # By role: under another file name the same bytes make the same pictures.
    dit = tree.dit_file()
    yield "dit", "", dit
    shards = shard_files(dit)
    if shards != [dit]:
        yield from (("dit", str(number), shard) for number, shard in enumerate(shards))
    if scales_file(dit).is_file():
        yield "dit", "map", scales_file(dit)


def _vae_files(tree: CheckpointTree) -> Files:
    yield "vae", "config", tree.vae_config
    yield "vae", "", tree.vae_weight


def _text_files(tree: CheckpointTree) -> Files:
    # In diffusers' layout four folders, in the released one two.
    for folder in dict.fromkeys((tree.text_encoder, tree.text_encoder_2, tree.tokenizer, tree.tokenizer_2)):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.suffix in _TEXT_TOWER_SUFFIXES:
                yield folder.name, path.name, path


def _digest_blocks(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the parts of a file of `size` bytes that enter the digest."""
    if size < _DIGEST_WHOLE_BELOW:
        return [(0, size)]
    last = size - _DIGEST_BLOCK
    return [(last * i // (_DIGEST_BLOCKS - 1), _DIGEST_BLOCK) for i in range(_DIGEST_BLOCKS)]
