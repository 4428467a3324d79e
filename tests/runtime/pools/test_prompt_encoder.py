"""Prompts are encoded once while an encoder remembers them."""

from __future__ import annotations

from hv_batch.runtime.pools.prompt_encoder import CACHE_SIZE, Embedder, Text
from tests.support.doubles import FakeEmbedding


class CountingEncoder:
    """Counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts, *, image):
        self.asked.append((tuple(prompts), image))
        return [FakeEmbedding(prompt, len(prompt.split())) for prompt in prompts]


def test_equal_prompts_are_encoded_once():
    """Design 2: in one call and in later ones; the template tells texts apart."""
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
    """P7: the texts longest unused are forgotten, also when one batch is larger than what is remembered."""
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
