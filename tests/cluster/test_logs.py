"""The logs of a run on a real Ray head: what the actors wrote into Ray's log folder, and what the driver wrote."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.request import urlopen

from tests.support.runs import command, finish, records, start, write_config, write_manifest


def actor_logs(ray_folder: Path) -> list[str]:
    """What the workers wrote to their stderr, each to a file of its own."""
    return [path.read_text() for path in (ray_folder / "session_latest" / "logs").glob("worker-*.err")]


def actor_records(ray_folder: Path) -> list[dict]:
    """The JSON records of all workers, in the order in which they were written."""
    lines = [line for log in actor_logs(ray_folder) for line in log.splitlines() if line.startswith("{")]
    return sorted(map(json.loads, lines), key=lambda record: record["time"])


def test_the_logs_of_the_actors_hold_the_history_of_every_sample(
    ray_head, ray_folder, metrics_url, planted_secret, tmp_path, marks
):
    """A search for a sample's key in Ray's log folder finds what each worker did with it, by attempt, and no secret:
    not even one that an engine logs.
    """
    config = write_config(tmp_path, marks, encoders={"batch_size": 1})
    prompts = ["good 0", f"bad !log-encode !raise-denoise-once {planted_secret}"]
    manifest, output = write_manifest(tmp_path, prompts), tmp_path / "out"
    driver = start([*command(config, manifest, output, ray_head[0]), "--log-format", "json"])
    code, text = finish(driver)
    assert code == 0, text
    run = json.loads(text.splitlines()[-1])["run"]
    found = [record for record in actor_records(ray_folder) if record.get("run") == run]
    logs, metrics = actor_logs(ray_folder), urlopen(metrics_url, timeout=10).read().decode()
    files = [path for path in ray_folder.rglob("*") if path.is_file()]
    of_ray = [path for path in files if planted_secret.encode() in path.read_bytes()]

    for sample, attempts in {"s00": 1, "s01": 2}.items():
        own = [record for record in found if record.get("sample") == sample]
        encoded, denoised, committed = (
            [(record["worker"].partition("-")[0], record["attempt"]) for record in own if word in record["message"]]
            for word in ("encoded ", "denoised in", "; committed: ")
        )
        assert encoded == [("encode", attempt + 1) for attempt in range(attempts)]
        assert denoised == [("denoise", attempts)]
        assert committed == [("decode", attempts)]
        assert records(output)[sample]["attempts"] == attempts
    (failure,) = [record for record in map(json.loads, text.splitlines()) if record.get("sample") == "s01"]
    assert (failure["level"], failure["attempt"]) == ("warning", 1)
    assert "POISON" in failure["message"]
    assert any("made to log at encode: bad" in log for log in logs)
    assert not [log for log in (*logs, text, metrics) if planted_secret in log]
    assert not of_ray, "nor any other file in Ray's folder"
    # The prompt itself is data of the user; what the failure says of it is not.
    documents = [path.read_text().replace(prompts[1], "") for path in output.rglob("*.json")]
    assert len(documents) > 3
    assert not [document for document in documents if planted_secret in document]
