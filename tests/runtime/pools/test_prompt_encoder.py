"""The encoder actor encodes each distinct prompt once while it is in the cache."""

from __future__ import annotations

from hv_batch.runtime.pools.prompt_encoder import CACHE_SIZE, Embedder, Text
from tests.support.doubles import FakeEmbedding


class CountingEncoder:
    """Counts its calls."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts, *, image):
        self.asked.append((tuple(prompts), image))
        return [FakeEmbedding(prompt, len(prompt.split())) for prompt in prompts]


def test_equal_prompts_are_encoded_once():
    """Equal texts share an embedding, in one call and in later ones, unless their templates differ."""
    encoder = CountingEncoder()
    embedder = Embedder(encoder)
    cat, dog, picture = Text("cat", False), Text("dog", False), Text("cat", True)
    found, encoded = embedder.embed([cat, dog, cat, picture])
    assert encoder.asked == [(("cat", "dog"), False), (("cat",), True)]
    assert encoded == {cat, dog, picture}
    again, encoded = embedder.embed([dog, cat])
    assert (encoded, len(encoder.asked)) == (frozenset(), 2)
    assert again == {cat: found[cat], dog: found[dog]}
    assert embedder.count == 5, "every text is a sign of life"


def test_memory_is_bounded():
    """P7: the least recently used texts are evicted, also if one batch is larger than the cache."""
    texts = [Text(f"{number:03d}", False) for number in range(CACHE_SIZE + 2)]
    embedder = Embedder(CountingEncoder())
    found, _ = embedder.embed(texts)
    assert len(found) == CACHE_SIZE + 2
    embedder = Embedder(CountingEncoder())
    embedder.embed(texts[:CACHE_SIZE])
    embedder.embed(texts[:1])
    embedder.embed(texts[CACHE_SIZE:])
    _, encoded = embedder.embed(texts[:3])
    assert encoded == set(texts[1:3])
