"""Each prompt is encoded once: what memory or the cache still holds is not computed again.

Rows with several videos, and the negative prompt that most rows share, come back within moments; the same manifest
with other seeds comes back the next night.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hv_batch.job.embedding_cache import EmbeddingCache
from hv_batch.protocol import Embedding, TextEncoder

REMEMBERED = 64  # embeddings of at most 2 MB: the samples in flight and then some


@dataclass(frozen=True, slots=True, order=True)
class Text:
    """What is encoded: the prompt, and whether with the template of an image."""

    prompt: str
    is_image: bool


class Embedder:
    """`count` grows with every text that was embedded, by whatever way."""

    def __init__(self, encoder: TextEncoder, cache: EmbeddingCache | None) -> None:
        self._encoder = encoder
        self._cache = cache
        self._memory: OrderedDict[Text, Embedding] = OrderedDict()
        self.count = 0

    def embed(self, texts: Iterable[Text]) -> tuple[dict[Text, Embedding], frozenset[Text]]:
        """The embedding of each text, and those of the texts that had to be encoded."""
        found: dict[Text, Embedding] = {}
        missing: list[Text] = []
        for text in sorted(set(texts)):
            embedding = self._recall(text)
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

    def _recall(self, text: Text) -> Embedding | None:
        if text in self._memory:
            return self._memory[text]
        if self._cache is None:
            return None
        arrays = self._cache.get(text.prompt, image=text.is_image)
        try:
            return None if arrays is None else self._encoder.unpack(arrays)
        except ValueError:  # whole, but not what this version packs
            return None

    def _encode(self, texts: list[Text], is_image: bool) -> dict[Text, Embedding]:
        embeddings = self._encoder.encode([text.prompt for text in texts], image=is_image)
        self.count += len(texts)
        if self._cache is not None:
            for text, embedding in zip(texts, embeddings, strict=True):
                self._cache.put(text.prompt, image=is_image, arrays=self._encoder.pack(embedding))
        return dict(zip(texts, embeddings, strict=True))
