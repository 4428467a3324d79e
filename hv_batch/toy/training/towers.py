"""Train the text towers on the captions of the toy world. Afterwards they are frozen.

Towers with random weights are not sufficient. The text tokens of the DiT have no position, so the states themselves
must encode whether "red" belongs to the shape or to the background; and the pooled vector must encode more than its
last word. Both towers are therefore trained with linear classifiers that predict every attribute of the scene from the
mean of LLaMA's states and from CLIP's pooled vector. The classifiers are discarded after the training.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hv_batch.architecture import CLIP_TOKENS, SKIPPED_LAYERS
from hv_batch.engine.text_encoders import IMAGE_TEMPLATE, VIDEO_TEMPLATE
from hv_batch.toy.captions import captioned_scenes
from hv_batch.toy.checkpoint import clip_config, clip_names, llama_config, write_tower
from hv_batch.toy.tokenizers import CAPTION_WORDS, WORDS, write_clip_tokenizer, write_llama_tokenizer
from hv_batch.toy.training.labels import CLASSES, labels

logger = logging.getLogger(__name__)

LLAMA_WIDTH = 96
CLIP_WIDTH = 64
LEARNING_RATE = 2e-3
FRAMES = (1, 33)  # half of the captions are of images, which have another template


@dataclass(frozen=True, slots=True)
class Settings:
    steps: int = 1500
    batch: int = 32
    seed: int = 0


class Probe(nn.Module):
    """A linear classifier for each attribute."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, classes) for classes in CLASSES.values())

    def loss(self, vectors: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross entropy over all attributes; vectors [B, width], targets [B, len(CLASSES)]."""
        losses = [F.cross_entropy(head(vectors), targets[:, i]) for i, head in enumerate(self.heads)]
        return torch.stack(losses).mean()

    def accuracy(self, vectors: Tensor, targets: Tensor) -> float:
        """Return the fraction of attributes that are predicted correctly."""
        predicted = torch.stack([head(vectors).argmax(-1) for head in self.heads], dim=1)
        return (predicted == targets).float().mean().item()


def train_towers(root: Path, settings: Settings, device: torch.device) -> None:
    """Train both towers and write them below `root` as text_encoder/ and text_encoder_2/."""
    from transformers import AutoTokenizer, CLIPTextModel, LlamaModel

    torch.manual_seed(settings.seed)
    words = f"{WORDS} {CAPTION_WORDS}".split()
    llama_dir, clip_dir = root / "text_encoder", root / "text_encoder_2"
    llama = LlamaModel(llama_config(write_llama_tokenizer(llama_dir, words), LLAMA_WIDTH)).to(device)
    clip = CLIPTextModel(clip_config(*write_clip_tokenizer(clip_dir, words), CLIP_WIDTH)).to(device)
    readers = (
        _LlamaReader(llama, AutoTokenizer.from_pretrained(llama_dir)),
        _ClipReader(clip, AutoTokenizer.from_pretrained(clip_dir)),
    )
    for reader, width in zip(readers, (LLAMA_WIDTH, CLIP_WIDTH), strict=True):
        _train(reader, Probe(width).to(device), settings, device)
    write_tower(llama_dir, llama.config, _halves(llama.state_dict()))
    write_tower(clip_dir, clip.config, clip_names(_halves(clip.state_dict())))


def _halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Round to float16, the dtype of the released towers, so that the DiT is trained with the rounded weights."""
    return {name: tensor.half().cpu() for name, tensor in state.items()}


class _LlamaReader(nn.Module):
    """Captions -> the mean of the states that the DiT receives (see `hv_batch.engine.text_encoders`)."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, prompts: list[str], is_image: bool, device: torch.device) -> Tensor:
        template = IMAGE_TEMPLATE if is_image else VIDEO_TEMPLATE
        texts = [f"{template.head}{prompt}{template.tail}" for prompt in prompts]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        states = self.model(**tokens, output_hidden_states=True).hidden_states[-(SKIPPED_LAYERS + 1)]
        mask = tokens["attention_mask"][:, template.crop_start :, None]
        return (states[:, template.crop_start :] * mask).sum(1) / mask.sum(1)


class _ClipReader(nn.Module):
    """Captions -> CLIP's pooled vector."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer

    def forward(self, prompts: list[str], is_image: bool, device: torch.device) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=CLIP_TOKENS, return_tensors="pt").to(
            device
        )
        pooled: Tensor = self.model(**tokens).pooler_output
        return pooled


def _train(reader: nn.Module, probe: Probe, settings: Settings, device: torch.device) -> None:
    parameters = list(chain(reader.parameters(), probe.parameters()))
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, settings.steps)
    series = {frames: captioned_scenes(settings.seed, frames, held_out=False) for frames in FRAMES}
    for step in range(settings.steps):
        frames = FRAMES[step % 2]
        scenes, prompts = zip(*islice(series[frames], settings.batch), strict=True)
        targets = torch.tensor([list(labels(scene).values()) for scene in scenes], device=device)
        vectors = reader(list(prompts), frames == 1, device)
        loss = probe.loss(vectors, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            name, accuracy = type(reader).__name__[1:], probe.accuracy(vectors, targets)
            logger.info(f"{name}: step {step + 1}, loss {loss.item():.4f}, {accuracy:.2%} of attributes correct")
