"""Manifests of tests: written to a folder or to memory, checked, and refused."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.index import Index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError


def write_rows(path: Path, *rows: dict) -> str:
    """Write rows as JSON Lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def check_file(path: str | Path, **options) -> Index:
    """The index of a valid manifest. `options` are the keys of `manifest` in the config."""
    config = RunConfig.model_validate({"manifest": options})
    return check_manifest(Manifest(str(path)), config, Store(f"memory://{uuid.uuid4().hex}"))


def refusal_of(path: str | Path, **options) -> str:
    """The message with which a manifest is refused."""
    with pytest.raises(UserError) as caught:
        check_file(path, **options)
    return str(caught.value)
