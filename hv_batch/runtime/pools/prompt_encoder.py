"""Each distinct prompt is encoded once while the actor remembers it.

The videos of one row, and the negative prompt that most rows share, need the same embedding within moments.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hv_batch.protocol import Embedding, TextEncoder

REMEMBERED = 64  # embeddings of at most 2 MB: the samples in flight and then some


@dataclass(frozen=True, slots=True, order=True)
class Text:
    """What is encoded: the prompt, and whether with the template of an image."""

    prompt: str
    is_image: bool


class Embedder:
    """`count` is the number of texts embedded so far, encoded or remembered."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._memory: OrderedDict[Text, Embedding] = OrderedDict()
        self.count = 0

    def embed(self, texts: Iterable[Text]) -> tuple[dict[Text, Embedding], frozenset[Text]]:
        """The embedding of each text, and those of the texts that had to be encoded."""
        found: dict[Text, Embedding] = {}
        missing: list[Text] = []
        for text in sorted(set(texts)):
            embedding = self._memory.get(text)
            if embedding is None:
                missing.append(text)
            else:
                found[text] = embedding
                self.count += 1
        for is_image in (False, True):
            group = [text for text in missing if text.is_image is is_image]
            if group:
                found.update(self._encode(group, is_image))
        for text, embedding in found.items():
            self._memory[text] = embedding
            self._memory.move_to_end(text)
        while len(self._memory) > REMEMBERED:
            self._memory.popitem(last=False)
        return found, frozenset(missing)

    def _encode(self, texts: list[Text], is_image: bool) -> dict[Text, Embedding]:
        embeddings = self._encoder.encode([text.prompt for text in texts], image=is_image)
        self.count += len(texts)
        return dict(zip(texts, embeddings, strict=True))
