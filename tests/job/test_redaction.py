"""hv_batch.job.redaction: no secret and no control character of a text from outside reaches a terminal or a log."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.redaction import (
    masked_text,
    printable_text,
    public_text,
    public_url,
    public_values,
    refuse_credentials,
    safe_text,
)
from hv_batch.job.storage.store import Store
from hv_batch.job.user_input import open_input
from hv_batch.protocol import UserError

KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCY"
SCHEMES = ["s3", "s3a", "gs", "gcs", "az", "abfs", "r2", "simplecache::s3"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_credentials_in_the_url_of_a_store_are_refused(scheme):
    """A4: as the output root, the manifest and the config; the message shows neither the key nor the secret."""
    url = f"{scheme}://{KEY}:{SECRET}@bucket/run-1"

    def read_input() -> None:
        with open_input("config", url):
            pass

    for use in (lambda: Store(url).exists("run.json"), lambda: Manifest(url).sources, read_input):
        with pytest.raises(UserError, match=r"with credentials in its URL.*AWS_SECRET_ACCESS_KEY") as refused:
            use()
        assert KEY not in str(refused.value)
        assert not any(part in str(refused.value) for part in SECRET.split("/"))


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c.mp4",
        "http://host:8080/x@y.jsonl",
        "https://user:password@host/x.jsonl",
        "abfs://container@account.dfs.core.windows.net/x",
        "s3://bucket/date=2026-11-20",
        "/tmp/a:b@c",
    ],
)
def test_other_urls_are_not_refused(url):
    refuse_credentials("manifest", url)


@pytest.mark.parametrize("scheme", [*SCHEMES, "https", "sftp", "ftp"])
def test_credentials_are_masked_in_every_text(scheme):
    """A4: in a message, in a traceback, and in a recorded value, whatever the scheme and also if there is a slash."""
    url = f"{scheme}://{KEY}:{SECRET}@bucket/run-1?X-Amz-Signature=abcdef"
    for text in (public_text(f"cannot read '{url}': denied"), public_url(url), str(public_values({"x": [url]}))):
        assert KEY not in text
        assert not any(part in text for part in (*SECRET.split("/"), "abcdef"))
    assert "bucket/run-1" in public_url(url)
    assert public_text("s3://bucket/a:b@c.mp4 and http://host:8080/x") == "s3://bucket/a:b@c.mp4 and http://host:8080/x"


def test_values_of_secret_variables_are_masked(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "planted-0123456789")
    assert masked_text("denied for planted-0123456789") == "denied for ***"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07\x1b[2J", r"\x1b]0;title\x07\x1b[2J"),
        ("up\x9b2A", r"up\x9b2A"),
        ("over\rwritten\b", r"over\x0dwritten\x08"),
        ("left \u202eto right", r"left \u202eto right"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("Füchse 狐 🦊", "Füchse 狐 🦊"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable_text(text) == shown


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_no_control_character_is_left(text):
    left = [char for char in safe_text(text, ()) if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp")]
    assert set(left) <= {"\n", "\t"}
