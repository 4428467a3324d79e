"""The released checkpoint tree (spec section 7): where its files lie, which are missing, which revision it is.

model_base/
  hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt    {"module": tensors}, perhaps {"ema": tensors}
  hunyuan-video-t2v-720p/vae/config.json, pytorch_model.pt
  text_encoder/                                                     the LLaMA language model and its tokenizer
  text_encoder_2/                                                   CLIP ViT-L/14 and its tokenizer
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hv_batch.engine.text import text_problems
from hv_batch.protocol import UserError

LAYOUT = (
    "the layout is <model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt, "
    "hunyuan-video-t2v-720p/vae/{config.json,pytorch_model.pt}, text_encoder/, text_encoder_2/}"
)

# What the text towers may read from their folders. A README or a downloader's notes do not change a picture.
_TEXT_TOWER_SUFFIXES = frozenset({".json", ".txt", ".model", ".jinja", ".safetensors", ".bin"})

# Below this a file is digested whole. Above, 64 blocks of 256 KiB spread evenly over it are: 16 MiB a file keeps the
# digest of the released 40 GB tree at seconds even on a network disk.
_DIGEST_WHOLE_BELOW = 16 * 2**20
_DIGEST_BLOCKS = 64
_DIGEST_BLOCK = 256 * 2**10


@dataclass(frozen=True, slots=True)
class CheckpointTree:
    """The paths of one checkpoint. `dit_weight` replaces the default DiT file by another file or by a folder of one."""

    model_base: Path
    dit_weight: Path | None = None
    load_key: str = "module"

    @property
    def vae_config(self) -> Path:
        return self.model_base / "hunyuan-video-t2v-720p" / "vae" / "config.json"

    @property
    def vae_weight(self) -> Path:
        return self.model_base / "hunyuan-video-t2v-720p" / "vae" / "pytorch_model.pt"

    @property
    def text_encoder(self) -> Path:
        return self.model_base / "text_encoder"

    @property
    def text_encoder_2(self) -> Path:
        return self.model_base / "text_encoder_2"

    def dit_file(self) -> Path:
        """The file that holds the DiT's tensors. Raises UserError when a folder holds none, or holds several.

        In a folder, as the official loader: `pytorch_model_<load_key>.pt`, else the `*_model_states.pt` of DeepSpeed.
        """
        if self.dit_weight is None:
            folder = self.model_base / "hunyuan-video-t2v-720p" / "transformers"
            return folder / "mp_rank_00_model_states.pt"
        if not self.dit_weight.is_dir():
            return self.dit_weight
        bare = self.dit_weight / f"pytorch_model_{self.load_key}.pt"
        if bare.is_file():
            return bare
        files = sorted(self.dit_weight.glob("*_model_states.pt"))
        if len(files) == 1:
            return files[0]
        found = "several: " + ", ".join(file.name for file in files) if files else "neither"
        raise UserError(
            f"dit_weight is the folder {self.dit_weight}, which should hold {bare.name} or one *_model_states.pt and "
            f"holds {found}. Name the file itself."
        )

    def missing(self) -> list[str]:
        """One sentence for each file that is not there, with the path where it is expected; empty when complete."""
        if not self.model_base.is_dir():
            return [f"model_base {self.model_base} is not a folder; {LAYOUT}"]
        found: list[str] = []
        try:
            required = {"DiT weights": self.dit_file()}
        except UserError as error:
            required = {}
            found.append(str(error))
        required |= {"VAE config": self.vae_config, "VAE weights": self.vae_weight}
        found += [f"{name} missing: {path} is not there" for name, path in required.items() if not path.is_file()]
        found += text_problems(self.text_encoder, self.text_encoder_2)
        return [f"{sentence}; {LAYOUT}" for sentence in found]


def revision(tree: CheckpointTree) -> str:
    """A digest, 64 hex digits, of the weights, configs and tokenizers that this tree would load (promise P3).

    Covers each file's role, name and size, all bytes of a file below 16 MiB, and of a larger one 64 evenly spread
    blocks of 256 KiB, its first and last among them. So it notices another, retrained, re-cast or truncated checkpoint,
    but not a few changed bytes between two blocks of a large file: it is no proof against bit rot or a forger. It
    depends neither on where the tree lies nor on file times. Raises UserError when a file is missing.
    """
    digest = hashlib.sha256()
    for name, path in _identity_files(tree):
        size = path.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        with path.open("rb") as file:
            for offset, length in _digest_blocks(size):
                file.seek(offset)
                digest.update(file.read(length))
    return digest.hexdigest()


def _identity_files(tree: CheckpointTree) -> Iterator[tuple[str, Path]]:
    if missing := tree.missing():
        raise UserError(missing[0])
    # The DiT is named by its role: under another file name the same bytes make the same pictures.
    yield "dit", tree.dit_file()
    yield "vae/config.json", tree.vae_config
    yield "vae/pytorch_model.pt", tree.vae_weight
    for folder in (tree.text_encoder, tree.text_encoder_2):
        for path in sorted(folder.iterdir()):
            if path.is_file() and not path.name.startswith(".") and path.suffix in _TEXT_TOWER_SUFFIXES:
                yield f"{folder.name}/{path.name}", path


def _digest_blocks(size: int) -> list[tuple[int, int]]:
    """(offset, length) of the parts of a file of `size` bytes that enter the digest."""
    if size < _DIGEST_WHOLE_BELOW:
        return [(0, size)]
    last = size - _DIGEST_BLOCK
    return [(last * i // (_DIGEST_BLOCKS - 1), _DIGEST_BLOCK) for i in range(_DIGEST_BLOCKS)]
