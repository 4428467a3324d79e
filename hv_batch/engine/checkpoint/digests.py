"""The revision of the weights: digests of the files that are loaded from a checkpoint tree (promises P2 and P3)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.tensor_files import shard_files
from hv_batch.engine.checkpoint.tree import LAYOUT, CheckpointTree, scales_file
from hv_batch.protocol import UserError

Files = Iterable[tuple[str, str, Path]]  # part, name within the part, path

# Files that the text encoders may read from their folders. Other files, such as a README, do not change pixels.
_TEXT_TOWER_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"})

# Files below this size are hashed completely. Of larger files, 2048 evenly spaced blocks of 8 KiB are hashed: 16 MiB of
# each file, which takes seconds for the released 40 GB tree. No matrix of a DiT block is small enough to lie between
# two hashed blocks, so weights that were merged into a single layer have another digest.
_DIGEST_WHOLE_BELOW = 16 * 2**20
_DIGEST_BLOCKS = 2048
_DIGEST_BLOCK = 8 * 2**10


def revision(tree: CheckpointTree) -> dict[str, str]:
    """Return one SHA-256 digest (64 hex digits) for each part of the tree (promise P3).

    The parts are "dit", "vae", and the folders of the text encoders and tokenizers.

    A digest covers the role, name and size of each file, all bytes of a file below 16 MiB, and 2048 evenly spaced
    blocks of 8 KiB of a larger file, including its first and last bytes. It therefore detects another, retrained,
    merged, re-cast or truncated checkpoint. It does not detect a few changed bytes between two blocks of a large file,
    so it protects neither against bit rot nor against forgery. It does not depend on the path of the tree or on file
    times. Raises UserError if a file is missing.
    """
    if missing := tree.missing():
        raise UserError("The model is incomplete: " + " | ".join([*missing, LAYOUT]))
    return _digests([*_dit_files(tree), *_vae_files(tree), *_text_files(tree)])


def vae_revision(tree: CheckpointTree) -> dict[str, str]:
    """Return the digest of the VAE only, which is sufficient to decode latents. Other files may be missing."""
    return _digests(_vae_files(tree))


def digest_file(digest: Any, name: str, path: Path) -> None:
    """Add a file to a hashlib digest: `name`, the size, and the bytes or blocks of bytes; see `revision`."""
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
    # Named by role, because the file name does not change pixels.
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
    # Four folders in the layout of diffusers, two in the released layout.
    for folder in dict.fromkeys((tree.text_encoder, tree.text_encoder_2, tree.tokenizer, tree.tokenizer_2)):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.suffix in _TEXT_TOWER_SUFFIXES:
                yield folder.name, path.name, path


def _digest_blocks(size: int) -> list[tuple[int, int]]:
    """Return (offset, length) of the blocks that are hashed of a file of `size` bytes."""
    if size < _DIGEST_WHOLE_BELOW:
        return [(0, size)]
    last = size - _DIGEST_BLOCK
    return [(last * i // (_DIGEST_BLOCKS - 1), _DIGEST_BLOCK) for i in range(_DIGEST_BLOCKS)]
