"""Prompts are encoded once: what an encoder remembers, and what a cache keeps for other runs."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.embedding_cache import REST_S, EmbeddingCache
from hv_batch.job.storage import Store
from hv_batch.runtime.embedder import REMEMBERED, Embedder, Text
from tests.doubles import FakeEncoder

ENCODER = {"weights": "ab", "precision": "fp16"}
ARRAYS = {"states": np.arange(12, dtype=np.float16).reshape(3, 4), "counts": np.array([3, 0])}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class CountingEncoder(FakeEncoder):
    """The double, without an engine's marks; counts what it is asked for."""

    def __init__(self):
        self.asked = []

    def encode(self, prompts, *, image):
        self.asked.append((tuple(prompts), image))
        return [self.unpack({"text": np.frombuffer(prompt.encode(), np.uint8)}) for prompt in prompts]


def entries(store: Store) -> list[str]:
    return [key for folder in range(256) for key in store.list(f"{folder:02x}/")]


# The cache ------------------------------------------------------------------------------------------------------------


def test_an_entry_comes_back_bit_for_bit(any_store):
    """P3: a cached embedding is the very arrays that were put, on every kind of store."""
    cache = EmbeddingCache(any_store, ENCODER)
    assert cache.get("a cat", image=False) is None
    cache.put("a cat", image=False, arrays=ARRAYS)
    found = EmbeddingCache(any_store, dict(reversed(ENCODER.items()))).get("a cat", image=False)
    assert found.keys() == ARRAYS.keys()
    assert all(found[name].tobytes() == ARRAYS[name].tobytes() for name in ARRAYS)
    assert all(found[name].dtype == ARRAYS[name].dtype for name in ARRAYS)


@pytest.mark.parametrize(
    ("prompt", "image", "encoder"), [("a  cat", False, ENCODER), ("a cat", True, ENCODER), ("a cat", False, {})]
)
def test_whatever_changes_the_bits_is_another_entry(prompt, image, encoder):
    """P3: another prompt, template or text encoder never finds this embedding."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    EmbeddingCache(store, ENCODER).put("a cat", image=False, arrays=ARRAYS)
    assert EmbeddingCache(store, encoder).get(prompt, image=image) is None


@settings(deadline=None)
@given(data=st.data())
def test_a_damaged_entry_is_none(data):
    """P3: truncated or altered anywhere, an entry is encoded anew, and its place is free for the new one."""
    store = Store(f"memory://{uuid.uuid4().hex}")
    cache = EmbeddingCache(store, ENCODER)
    cache.put("a cat", image=False, arrays=ARRAYS)
    (key,) = entries(store)
    whole = store.get(key)
    at = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(0, 255), label="0 truncates")
    store.put(key, whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] if flip else whole[:at])
    found = cache.get("a cat", image=False)
    if found is not None:  # blanks in the header mean nothing
        assert all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)
        return
    assert not store.exists(key)
    cache.put("a cat", image=False, arrays=ARRAYS)
    assert cache.get("a cat", image=False) is not None


def test_a_store_that_fails_is_left_alone_for_a_while(s3, s3_store):
    """P5: no run fails of its cache, or waits for it prompt by prompt; when it answers again it is used again."""
    clock = Clock()
    cache = EmbeddingCache(s3_store, ENCODER, clock)
    cache.put("a cat", image=False, arrays=ARRAYS)
    s3.faults = [503] * 100
    s3.methods = {"GET", "PUT"}
    assert cache.get("a cat", image=False) is None
    asked = s3.spoilt
    assert cache.get("a cat", image=False) is None
    cache.put("a dog", image=False, arrays=ARRAYS)
    assert s3.spoilt == asked
    clock.now = REST_S
    s3.faults = []
    assert cache.get("a cat", image=False) is not None


def test_a_cache_that_may_not_be_written_is_read(tmp_path, monkeypatch):
    """P5: another's cache is of use all the same."""
    store = Store(str(tmp_path))
    EmbeddingCache(store, ENCODER).put("a cat", image=False, arrays=ARRAYS)

    def refuse(*_):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(Store, "put_new", refuse)
    clock = Clock()
    cache = EmbeddingCache(store, ENCODER, clock)
    cache.put("a dog", image=False, arrays=ARRAYS)
    clock.now = REST_S
    assert cache.get("a cat", image=False) is not None


# The embedder ---------------------------------------------------------------------------------------------------------


def test_equal_prompts_are_encoded_once():
    """Design 2: in one call and in later ones; the template tells texts apart."""
    encoder = CountingEncoder()
    embedder = Embedder(encoder, None)
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
    texts = [Text(f"{number:03d}", False) for number in range(REMEMBERED + 2)]
    embedder = Embedder(CountingEncoder(), None)
    found, _ = embedder.embed(texts)
    assert len(found) == REMEMBERED + 2
    embedder = Embedder(CountingEncoder(), None)
    embedder.embed(texts[:REMEMBERED])
    embedder.embed(texts[:1])
    embedder.embed(texts[REMEMBERED:])
    _, encoded = embedder.embed(texts[:3])
    assert encoded == set(texts[1:3])


def test_another_run_finds_what_was_encoded(any_store):
    """Embedding cache: shared between runs; equal embeddings, nothing encoded."""
    text = Text("a cat", False)
    first = Embedder(CountingEncoder(), EmbeddingCache(any_store, ENCODER)).embed([text])
    encoder = CountingEncoder()
    second = Embedder(encoder, EmbeddingCache(any_store, ENCODER)).embed([text])
    assert (first[0], first[1], second[1]) == (second[0], {text}, frozenset())
    assert encoder.asked == []


def test_what_another_version_packed_is_encoded_anew(tmp_path):
    """P3: whole arrays that the encoder does not know are no embedding."""
    cache, text = EmbeddingCache(Store(str(tmp_path)), ENCODER), Text("a cat", False)
    cache.put("a cat", image=False, arrays=ARRAYS)
    _, encoded = Embedder(CountingEncoder(), cache).embed([text])
    assert encoded == {text}
