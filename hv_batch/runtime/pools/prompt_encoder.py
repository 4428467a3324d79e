"""Encodes prompts, with a cache of recent embeddings.

The videos of one row need the same embedding soon after each other, and most rows share one negative prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from hv_batch.protocol import Embedding, TextEncoder

CACHE_SIZE = 64  # embeddings of at most 2 MB: more than the samples in flight need


@dataclass(frozen=True, slots=True, order=True)
class Text:
    """A prompt, and whether it is encoded with the template of an image instead of that of a video."""

    prompt: str
    is_image: bool


class Embedder:
    """`count` is the number of texts embedded so far, from the cache or not."""

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._cache: OrderedDict[Text, Embedding] = OrderedDict()
        self.count = 0

    def embed(self, texts: Iterable[Text]) -> tuple[dict[Text, Embedding], frozenset[Text]]:
        """The embedding of each distinct text, and the set of the texts that were not in the cache."""
        found: dict[Text, Embedding] = {}
        missing: list[Text] = []
        for text in sorted(set(texts)):
            embedding = self._cache.get(text)
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
            self._cache[text] = embedding
            self._cache.move_to_end(text)
        while len(self._cache) > CACHE_SIZE:
            self._cache.popitem(last=False)
        return found, frozenset(missing)

    def _encode(self, texts: list[Text], is_image: bool) -> dict[Text, Embedding]:
        embeddings = self._encoder.encode([text.prompt for text in texts], image=is_image)
        self.count += len(texts)
        return dict(zip(texts, embeddings, strict=True))
