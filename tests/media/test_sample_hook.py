"""The sample hook: what it may do to a media file, and what of it goes into the record."""

from __future__ import annotations

import hashlib
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from hv_batch.job.config.sections import MediaConfig
from hv_batch.job.hooks.hook import Hook, HookFailedError, HookUnavailableError, describe_hook, parse_hook
from hv_batch.job.records.commits import describe_sample
from hv_batch.media.ffmpeg import FfmpegError
from hv_batch.media.probe import decode_media
from hv_batch.media.sample_hook import check_sample_hook, run_sample_hook
from hv_batch.media.writer import MediaInfo, write_media
from tests.support.rendered_roots import make_sample

SAMPLE = describe_sample(make_sample(1, num_frames=1, height=32, width=48))


@pytest.fixture
def media(tmp_path) -> MediaInfo:
    frames = [np.full((1, 32, 48, 3), 90, np.uint8)]
    size = {"height": 32, "width": 48, "num_frames": 1}
    return write_media(frames, tmp_path / "s001", **size, fps=24, media=MediaConfig())


def python(code: str) -> Hook:
    return parse_hook(f"{sys.executable} -c {shlex.quote(code)}")


def test_the_hash_is_that_of_the_changed_file(media):
    """P1: the record describes the bytes that are committed; the frames are still those of the decoder."""
    code = "import sys; from PIL import Image; Image.open(sys.argv[1]).rotate(180).save(sys.argv[1], comment='mine')"
    before = media.path.read_bytes()
    done = run_sample_hook(python(code), media, SAMPLE, 30.0)
    content = media.path.read_bytes()
    assert content != before
    assert (done.sha256, done.bytes) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (done.frames_sha256, done.hook) == (media.frames_sha256, None)
    assert decode_media(content, ".png").num_frames == 1


def test_a_scorer_answers_and_leaves_the_file(media):
    code = "import json, sys; print(json.dumps({'aesthetic': json.load(sys.stdin)['scores']['luma_mean'] / 10}))"
    done = run_sample_hook(python(code), media, SAMPLE, 30.0)
    assert done.hook == {"aesthetic": 9.0}
    assert done.sha256 == media.sha256


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import os, sys; os.remove(sys.argv[1])", "has removed the file"),
        ("import sys; open(sys.argv[1], 'w')", "has left no file"),
        ("import os, sys; os.remove(sys.argv[1]); os.symlink('/etc/hostname', sys.argv[1])", "has left no file"),
        ("import sys; open(sys.argv[1], 'r+b').write(b'no picture')", "cannot be decoded"),
        ("import sys; from PIL import Image; Image.new('RGB', (8, 8)).save(sys.argv[1])", "1 frames of 8x8 from"),
        ("print([1])", "allowed: an object"),
        ("print('{\"a\": \"' + 'x' * 70000 + '\"}')", "allowed: an object of at most"),
        ("raise SystemExit(1)", "exit code 1"),
    ],
)
def test_a_hook_that_spoils_the_file_is_a_failure_of_the_sample(media, code, problem):
    """P5: POISON, as the same file would meet the same hook again."""
    with pytest.raises(HookFailedError, match=problem):
        run_sample_hook(python(code), media, SAMPLE, 30.0)


def test_a_broken_ffmpeg_is_not_a_failure_of_the_sample(media, tmp_path, monkeypatch):
    """P5: the changed file cannot be checked on this node; another worker tries."""
    script = tmp_path / "ffmpeg"
    script.write_text("#!/bin/sh\nexit 132\n")
    script.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
    with pytest.raises(FfmpegError, match="ffmpeg exited with status 132"):
        run_sample_hook(python("import sys; open(sys.argv[1], 'ab').write(b'mark')"), media, SAMPLE, 30.0)


def test_a_function_gets_the_path_and_the_sample(media, tmp_path, monkeypatch):
    source = "def mark(path, sample):\n    sample.clear()\n    return {'name': path.name}\n"
    (tmp_path / "marking_module.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    done = run_sample_hook(parse_hook("marking_module:mark"), media, SAMPLE, 30.0)
    assert done.hook == {"name": "s001.png"}
    assert SAMPLE["id"] == "s001", "a function gets a copy"


def test_a_node_with_another_version_of_the_hook_does_not_use_it(tmp_path):
    """P3: all nodes write the same bytes."""
    script = Path(tmp_path / "mark.py")
    script.write_text("pass")
    hook = parse_hook(f"{sys.executable} {script}")
    expected = describe_hook(hook)
    check_sample_hook(hook, expected)
    script.write_text("pass  # newer")
    with pytest.raises(HookUnavailableError, match="another content than that of the driver"):
        check_sample_hook(hook, expected)
    script.unlink()
    with pytest.raises(HookUnavailableError):
        check_sample_hook(hook, expected)
