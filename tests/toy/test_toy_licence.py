"""The toy declares its licence, and only for its own weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from hv_batch.engine.checkpoint.licence_file import FILE
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import LICENCE, dit_file
from hv_batch.toy.trained import write_trained_checkpoint


def test_the_toys_videos_are_not_under_the_licence_of_the_release(tmp_path: Path):
    assert HunyuanVideo(model_base=write_trained_checkpoint(tmp_path)).licence() == LICENCE


def test_other_weights_in_the_toys_tree_do_not_get_its_licence(tmp_path: Path):
    base = write_trained_checkpoint(tmp_path)
    data = bytearray(dit_file(base).read_bytes())
    data[len(data) // 2] ^= 1
    dit_file(base).write_bytes(data)
    assert HunyuanVideo(model_base=base).licence() is None


def test_a_damaged_declaration_is_an_error_and_not_a_licence(tmp_path: Path):
    base = write_trained_checkpoint(tmp_path)
    (base / FILE).write_text("not JSON")
    with pytest.raises(UserError, match=FILE):
        HunyuanVideo(model_base=base).licence()
