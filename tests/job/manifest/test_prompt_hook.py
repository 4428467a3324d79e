"""The prompt hook: a real command or function rewrites and drops rows of a checked manifest."""

from __future__ import annotations

import json
import shlex
import sys

import pytest

from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.manifest import prompt_hook
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.index import load_index, load_recorded_index
from hv_batch.job.manifest.prompt_hook import ORIGINAL, apply_prompt_hook, describe_results
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.storage.store import Store
from hv_batch.protocol import UserError
from tests.support.runs import FAKE_CONFIG

REWRITE = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    if "gun" in row["prompt"]:
        answer = {"drop": "a weapon"}
    elif "plain" in row["prompt"]:
        answer = {}
    else:
        answer = {"prompt": f"{row['prompt']}, {row['style']}, at dawn"}
    print(json.dumps(answer))
"""
ROWS = [
    {"id": "a", "prompt": "a fox", "style": "oil", "num_videos": 2},
    {"prompt": "a gun", "style": "ink"},
    {"prompt": "a plain 狐狸", "style": "ink", "num_frames": 17},
    {"id": "d", "prompt": "gun and fox", "style": "ink"},
]


@pytest.fixture
def manifest(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return Manifest(str(path))


def config(code: str = REWRITE, **changes) -> RunConfig:
    command = f"{sys.executable} -c {shlex.quote(code)}"
    return RunConfig.model_validate({**FAKE_CONFIG, "hooks": {"prompt": command, **changes}})


def rewritten(manifest: Manifest, settings: RunConfig, tmp_path):
    scratch = Store(str(tmp_path / "scratch"))
    return apply_prompt_hook(check_manifest(manifest, settings, scratch), manifest, settings, scratch)


def answering(*answers) -> RunConfig:
    return config(f"print({chr(10).join(map(json.dumps, answers))!r})")


def test_rows_are_rewritten_and_dropped_and_keep_keys_and_seeds(manifest, tmp_path):
    """P2, P3: keys and seeds follow from the rows as they were written, whatever the hook answers."""
    settings = config()
    plain = {s.key: s for s in check_manifest(manifest, settings, Store(str(tmp_path / "plain")))}
    index = rewritten(manifest, settings, tmp_path)
    samples = list(index)
    assert [s.params.prompt for s in samples] == ["a fox, oil, at dawn"] * 2 + ["a plain 狐狸"]
    assert [s.extra[ORIGINAL] for s in samples] == ["a fox", "a fox", "a plain 狐狸"]
    assert [(s.row, s.id, s.params.seed) for s in samples] == [
        (plain[s.key].row, plain[s.key].id, plain[s.key].params.seed) for s in samples
    ]
    summary = index.summary
    assert (summary.rows, summary.samples, summary.shards) == (4, 3, 1)
    assert summary.shapes == {(64, 64, 9): 2, (64, 64, 17): 1}
    assert list(describe_results(summary.prompt_hook))[:2] == [
        "the prompt hook has rewritten 1 rows and dropped 2",
        f'dropped: row 2 (id "{summary.prompt_hook["drops"][0]["id"]}"): "a weapon"',
    ]


def test_a_resume_sees_the_same_texts_without_calling_the_hook(manifest, tmp_path):
    """P2: an answer of a language model cannot be had twice."""
    settings, root = config(), Store(str(tmp_path / "root"))
    index = rewritten(manifest, settings, tmp_path)
    index.publish(root)
    for again in (load_index(root, manifest, settings), load_recorded_index(root, settings, index.summary.digest)):
        assert [s.params.prompt for s in again] == [s.params.prompt for s in index]
        assert again.summary.prompt_hook == index.summary.prompt_hook
    assert load_index(root, manifest, RunConfig.model_validate(FAKE_CONFIG)) is None, "the index is that of the hook"


def test_other_answers_are_another_run(manifest, tmp_path):
    """P3: the digest of the answers is part of the identity."""
    digests = set()
    for number, word in enumerate(["dawn", "dusk", "dawn"]):
        index = rewritten(manifest, config(REWRITE.replace("dawn", word)), tmp_path / str(number))
        digests.add(index.summary.prompt_hook["sha256"])
    assert len(digests) == 2


def test_a_plan_without_hook_does_not_mention_it(manifest, tmp_path):
    """P2: what is not set is not written."""
    root = Store(str(tmp_path / "root"))
    check_manifest(manifest, RunConfig.model_validate(FAKE_CONFIG), Store(str(tmp_path / "s"))).publish(root)
    assert b"prompt_hook" not in root.get("plan/index.json")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (answering({}, {}, {}), "gave 3 answers for 4 rows"),
        (answering({}, {}, {}, {"prompt": "  "}), r"row 4: its prompt is .*; allowed"),
        (answering({}, {"prompt": 3}, {}, {}), r"row 2: its answer is .*allowed"),
        (answering({}, {}, {"seed": 3}, {}), r"row 3: its answer is .*allowed"),
        (answering(*[{"drop": "no reason"}] * 4), "dropped all 4 rows"),
        (config("raise SystemExit('no key')"), "exit code 1: no key"),
        (config("import time; time.sleep(30)", prompt_timeout_s=0.2), r"did not end within 0\.2 s"),
    ],
)
def test_a_hook_that_fails_stops_the_run_before_it_begins(settings, problem, manifest, tmp_path):
    """P6: one paragraph with the cause and the remedy."""
    with pytest.raises(UserError, match=problem) as caught:
        rewritten(manifest, settings, tmp_path)
    assert "orrect the hook (hooks.prompt)" in str(caught.value)


def test_prompts_that_were_rewritten_before_are_not_rewritten_again(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a fox", ORIGINAL: "fox"}) + "\n")
    with pytest.raises(UserError, match=f"has a column {ORIGINAL}"):
        rewritten(Manifest(str(path)), config(), tmp_path)


def test_a_function_gets_and_returns_the_rows(manifest, tmp_path, monkeypatch):
    source = "def rewrite(rows):\n    return [{'prompt': row['prompt'].upper()} for row in rows]\n"
    (tmp_path / "rewriting_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    settings = RunConfig.model_validate({**FAKE_CONFIG, "hooks": {"prompt": "rewriting_module:rewrite"}})
    assert next(iter(rewritten(manifest, settings, tmp_path))).params.prompt == "A FOX"


def test_the_list_of_dropped_rows_is_bounded(manifest, tmp_path, monkeypatch):
    """P7: the counts are complete."""
    monkeypatch.setattr(prompt_hook, "MAX_LISTED", 1)
    results = rewritten(manifest, config(), tmp_path).summary.prompt_hook
    assert (results["dropped"], len(results["drops"])) == (2, 1)
