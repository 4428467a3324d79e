"""Hooks in whole runs on a real Ray."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from hv_batch.protocol import UserError
from tests.support.cli_calls import hv_batch
from tests.support.runs import command, finish, records, render, start, table, write_config, write_manifest

MARK = """
import json, sys
from pathlib import Path
sample = json.load(sys.stdin)
if "refuse" in sample["params"]["prompt"]:
    sys.exit("this prompt is refused")
path = Path(sys.argv[1])
data = path.read_bytes()
size = 8 + len("made by a model")
path.write_bytes(data + size.to_bytes(4, "big") + b"free" + b"made by a model")  # a box that players skip
print(json.dumps({"words": len(sample["params"]["prompt"].split())}))
"""


@pytest.mark.slow
def test_the_sample_hook_marks_every_file_before_its_commit(ray_head, tmp_path, marks):
    """P1, P5: records describe the marked files; a refused sample is quarantined, and a bare resume runs nothing."""
    script = tmp_path / "mark.py"
    script.write_text(MARK)
    hook = f"{sys.executable} {script}"
    config = write_config(tmp_path, marks, hooks={"sample": hook, "sample_timeout_s": 50.0})
    manifest, output = write_manifest(tmp_path, ["a red kite", "refuse this", "hills"]), tmp_path / "out"
    code, text = render(config, manifest, output, ray_head[0])
    assert code == 3, text
    committed = records(output)
    assert {key: record["hook"] for key, record in committed.items()} == {"s00": {"words": 3}, "s02": {"words": 1}}
    for record in committed.values():
        content = (output / record["file"]).read_bytes()
        assert content.endswith(b"made by a model")
        assert hashlib.sha256(content).hexdigest() == record["sha256"]
    assert [json.loads(row["hook"]) for row in table(output)] == [{"words": 3}, {"words": 1}]
    refused = records(output, "quarantine")["s01"]
    assert refused["class"] == "POISON"
    assert "exit code 1: this prompt is refused" in refused["message"]
    identity = json.loads(Path(output / "run.json").read_text())["identity"]["hooks"]["sample"]
    assert identity["name"] == hook

    with pytest.raises(UserError, match=re.escape(f"--hook {shlex.quote(hook)}")):
        hv_batch("resume", output)
    assert hv_batch("verify", output, "--deep")[0] == 0
    script.write_text(MARK + "#")
    with pytest.raises(UserError, match=r"hooks\.sample\.sha256: "):
        hv_batch("resume", output, "--hook", hook)


REWRITE = """
import json, sys
from pathlib import Path
with (Path(sys.argv[0]).parent / "calls").open("a") as calls:
    calls.write("called\\n")
for line in sys.stdin:
    prompt = json.loads(line)["prompt"]
    print(json.dumps({"drop": "too dull"} if prompt == "dull" else {"prompt": prompt + ", at dawn"}))
"""


@pytest.mark.slow
def test_the_prompt_hook_runs_once_and_the_end_is_reported(ray_head, tmp_path, marks):
    """P2: the same command again calls no hook and finds nothing to render; each command reports its end."""
    script, calls = tmp_path / "rewrite.py", tmp_path / "calls"
    script.write_text(REWRITE)
    hook = f"{sys.executable} {script}"
    config = write_config(tmp_path, marks, hooks={"prompt": hook})
    manifest, output = write_manifest(tmp_path, ["a red kite", "dull", "hills"]), tmp_path / "out"
    report = f"{sys.executable} -c 'import sys; open(sys.argv[1], \"a\").write(sys.stdin.read())' {tmp_path}/ends"
    for _ in range(2):
        arguments = [*command(config, manifest, output, ray_head[0]), "--on-finish", report]
        code, text = finish(start(arguments))
        assert code == 0, text
        assert calls.read_text() == "called\n"
    found = records(output)
    assert {key: record["params"]["prompt"] for key, record in found.items()} == {
        "s00": "a red kite, at dawn",
        "s02": "hills, at dawn",
    }
    assert [row["prompt_original"] for row in table(output)] == ["a red kite", "hills"]
    plan = json.loads((output / "plan" / "index.json").read_text())["summary"]["prompt_hook"]
    assert plan["drops"] == [{"row": 2, "id": "s01", "reason": "too dull"}]
    assert "a red kite" in (output / "report" / "index.html").read_text()
    ends = [json.loads(part) for part in (tmp_path / "ends").read_text().replace("}{", "}\n{").splitlines()]
    assert [(end["outcome"], end["summary"]["committed"]) for end in ends] == [("committed", 2)] * 2
