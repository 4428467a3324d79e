"""An output root names an engine, and the operator decides which engines may be imported (P2, issue of trust)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from hv_batch.bench.sleep_engine import SleepEngine
from hv_batch.job import layout
from hv_batch.job.config.engine_factory import METHODS, OWN_ENGINES, VARIABLE, build_engine, refuse_unknown_engine
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.records.run_document import read_run, read_run_config, recorded_spool_folder
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.cli_calls import files, hv_batch
from tests.support.small_runs import run_small, some_samples

MINE = "some_package.engines:Mine"


@pytest.fixture
def root(tmp_path) -> Path:
    run_small(Store(str(tmp_path / "root")), some_samples(2))
    return tmp_path / "root"


def name_engine(root: Path, engine: str, **options) -> None:
    """Somebody with access to the bucket writes this into run.json."""
    run = json.loads((root / layout.RUN).read_text())
    run["config"]["model"] = {"engine": engine, "options": options}
    (root / layout.RUN).write_text(json.dumps(run))


@pytest.mark.parametrize("command", [["resume"], ["verify", "--repair"]])
def test_a_root_cannot_have_a_command_executed(root, tmp_path, command):
    """`os:system` with a command in its options, as anyone could write it into run.json."""
    name_engine(root, "os:system", command=f"touch {tmp_path}/executed")
    (root / layout.SUCCESS).unlink()
    next(root.glob("data/*/s001-*")).unlink()
    before = files(str(root))
    with pytest.raises(UserError, match="names the engine os:system, which is not known here"):
        hv_batch(*command[:1], root, *command[1:])
    assert not (tmp_path / "executed").exists()
    assert {name: data for name, data in files(str(root)).items() if "lease" not in name} == before


def test_an_unknown_engine_is_not_even_imported(root, tmp_path, monkeypatch):
    """Importing a module executes it."""
    (tmp_path / "lurking_module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    name_engine(root, "lurking_module:Engine")
    with pytest.raises(UserError, match="not known here"):
        hv_batch("resume", root)
    assert not (tmp_path / "imported").exists()
    assert "lurking_module" not in sys.modules


def test_the_operator_names_engines(root, monkeypatch):
    """On the command line, in the environment, or by a package that announces its engines."""
    name_engine(root, MINE)
    with pytest.raises(UserError, match=f"--engine {MINE}"):
        read_run_config(str(root))
    assert read_run_config(str(root), [MINE])[0].model.engine == MINE
    with pytest.raises(UserError, match="cannot be imported"):
        hv_batch("resume", root, "--engine", MINE)
    monkeypatch.setenv(VARIABLE, f"other:Engine, {MINE}")
    assert read_run_config(str(root))[0].model.engine == MINE


def test_installed_packages_announce_engines(tmp_path, monkeypatch):
    """The entry-point group `hv_batch.engines`."""
    info = tmp_path / "some_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: some_package\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[hv_batch.engines]\nmine = {MINE}\n")
    with pytest.raises(UserError, match="not known here"):
        refuse_unknown_engine(MINE, "root")
    monkeypatch.syspath_prepend(tmp_path)
    refuse_unknown_engine(MINE, "root")


@pytest.mark.parametrize("engine", sorted(OWN_ENGINES))
def test_our_own_engines_need_no_name(engine):
    """Resuming one's own root by its name alone stays one command."""
    refuse_unknown_engine(engine, "root")


@pytest.mark.parametrize("path", ["hv_batch.job.storage.store:Store", "hv_batch.cli.main:main", "os:system", "os:path"])
def test_only_a_class_with_the_methods_of_an_engine_is_called(path, monkeypatch):
    """Also if the operator's own config names it."""
    monkeypatch.setattr(os, "system", lambda command: pytest.fail("executed"))
    with pytest.raises(UserError, match=r"is not a class|is a class without the methods check"):
        build_engine(path, {"command": "true"})
    assert set(METHODS) >= {"check", "identity", "join", "decoder"}
    assert isinstance(build_engine("hv_batch.bench.sleep_engine:SleepEngine", {}), SleepEngine)


def test_loras_need_an_engine_that_supports_them():
    """P6: an engine without LoRA refuses rows that name one, because its config cannot have any."""
    loras = {"film": {"path": "film.safetensors"}}
    config = RunConfig.model_validate({"model": {"engine": "hv_batch.bench.sleep_engine:SleepEngine", "loras": loras}})
    with pytest.raises(UserError, match="does not support LoRAs"):
        build_engine(config.model.engine, config.model.engine_options())


def test_a_root_cannot_choose_a_folder_to_write_to(root):
    """A recorded spool folder is only read: new videos wait in this machine's temporary folder."""
    run = json.loads((root / layout.RUN).read_text())
    run["config"]["output"]["spool_folder"] = "/home/victim"
    (root / layout.RUN).write_text(json.dumps(run))
    config, _ = read_run_config(str(root))
    assert config.output.spool_folder is None
    assert recorded_spool_folder(read_run(Store(str(root)))) == "/home/victim"
