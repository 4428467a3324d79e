"""Which places of the Hugging Face Hub can be an output root."""

from __future__ import annotations

from fsspec.utils import get_protocol

from hv_batch.protocol import UserError

BUCKETS = "buckets/"  # the object storage of the Hub, which has no commits


def refuse_hub_repository(url: str) -> None:
    """Raises UserError if the URL of an output root is a repository of the Hub, where each write is a commit."""
    if get_protocol(url) != "hf" or url.partition("://")[2].startswith(BUCKETS):
        return
    raise UserError(
        f"The output root {url} is a repository of the Hugging Face Hub. A run makes about five writes for a sample, "
        "each write would be a commit, and the Hub allows 128 commits an hour. Render to a folder, a bucket or "
        "hf://buckets/USER/NAME, and push the finished dataset: `hv-batch export ROOT --hub DIR`, then `hf upload "
        "USER/NAME DIR . --repo-type dataset`."
    )
