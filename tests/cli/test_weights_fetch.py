"""`hv-batch weights fetch`: from a hub (here a small HTTP server with the same protocol) and from local copies."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hv_batch.architecture import DiTConfig
from hv_batch.cli.main import app
from hv_batch.engine.checkpoint.loading import verify
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from hv_batch.weights.fetching import DIFFUSERS, LLAVA, RELEASED, fetch

HUNYUAN, CLIP = "tencent/HunyuanVideo", "openai/clip-vit-large-patch14"
COMMITS = {HUNYUAN: "a" * 40, LLAVA: "b" * 40, CLIP: RELEASED[2].revision}
TRANSFORMERS = "hunyuan-video-t2v-720p/transformers"


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """The three repositories at toy width as plain folders, org/name, with further files that must not be fetched."""
    root = tmp_path_factory.mktemp("repos")
    toy = write_toy_checkpoint(tmp_path_factory.mktemp("toy"))
    hunyuan = Path(shutil.copytree(toy / "hunyuan-video-t2v-720p", root / HUNYUAN / "hunyuan-video-t2v-720p")).parent
    (hunyuan / "LICENSE.txt").write_text("terms")
    (hunyuan / "assets.mp4").write_text("large")
    (hunyuan / TRANSFORMERS / "mp_rank_00_model_states_fp8.pt").write_text("fp8")
    (hunyuan / TRANSFORMERS / "mp_rank_00_model_states_fp8_map.pt").write_text("map")
    shutil.copytree(toy / "text_encoder_2", root / CLIP)
    (root / CLIP / "tf_model.h5").write_text("large")
    llava = Path(shutil.copytree(toy / "text_encoder", root / LLAVA))
    text = json.loads((llava / "config.json").read_text())
    (llava / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    state = load_file(llava / "model.safetensors")
    named = {f"language_model.model.{name}": tensor for name, tensor in state.items()}
    save_file(named | {"vision_tower.x": torch.zeros(2)}, llava / "model.safetensors")
    return root


@pytest.fixture
def hub(repos):
    """A hub that serves `repos` at `commits`; `served` are the files it sent."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def answer(self, body):
            path = self.path.partition("?")[0].strip("/")
            if path.startswith("api/models/"):
                self.send_repo(path.removeprefix("api/models/"))
                return
            name, _, rest = path.partition("/resolve/")
            commit, _, file = rest.partition("/")
            if commit != server.commits[name]:
                self.send_error(404)
                return
            self.send_file(name, file, body)

        def send_repo(self, path):
            name, _, rest = path.partition("/revision/")
            is_tree = not rest
            if is_tree:
                name, _, rest = path.partition("/tree/")
            if name not in server.commits or rest not in ("main", server.commits[name]):
                self.send_response(404)
                self.send_header("X-Error-Code", "RevisionNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            files = sorted(path for path in (repos / name).rglob("*") if path.is_file())
            relative = [path.relative_to(repos / name).as_posix() for path in files]
            if is_tree:
                self.send_json(
                    [
                        {"type": "file", "path": name, "size": path.stat().st_size, "oid": "0" * 40}
                        for name, path in zip(relative, files, strict=True)
                    ]
                )
            else:
                siblings = [{"rfilename": file} for file in relative]
                self.send_json({"id": name, "sha": server.commits[name], "siblings": siblings})

        def send_json(self, value):
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def send_file(self, name, file, body):
            content = (repos / name / file).read_bytes()
            start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if "Range" in self.headers else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", server.commits[name])
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                server.served.append(f"{name}/{file}")
                self.wfile.write(content[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.commits, server.served = dict(COMMITS), []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def endpoint(hub):
    return f"http://127.0.0.1:{hub.server_port}"


def record(target):
    return {name: entry["commit"] for name, entry in json.loads((target / "fetch.json").read_text()).items()}


def test_a_fetched_tree_loads_and_records_its_commits(hub, tmp_path):
    """Three repositories become one tree. Only the required files are fetched; LLaVA is extracted and then deleted."""
    target = tmp_path / "ckpts"
    fetch(target, endpoint=endpoint(hub))
    assert verify(CheckpointTree(target), DiTConfig(**TOY_DIT)) == []
    assert record(target) == COMMITS
    assert (target / "LICENSE.txt").read_text() == "terms"
    assert not [name for name in hub.served if name.endswith((".mp4", ".h5", "fp8.pt"))]
    assert not (target / ".llava").exists()

    hub.served.clear()
    fetch(target, endpoint=endpoint(hub))
    assert hub.served == []
    fetch(target, fp8=True, endpoint=endpoint(hub))
    assert [Path(name).name for name in sorted(hub.served)] == [
        "mp_rank_00_model_states_fp8.pt",
        "mp_rank_00_model_states_fp8_map.pt",
    ]


def test_a_folder_keeps_its_first_commit(hub, tmp_path):
    """P3: if "main" moves between two fetches, the rest of the folder is fetched at the commit recorded first."""
    del hub.commits[LLAVA]
    with pytest.raises(UserError, match=f"{LLAVA} at main could not be fetched"):
        fetch(tmp_path, endpoint=endpoint(hub))
    assert record(tmp_path) == {HUNYUAN: "a" * 40}
    hub.commits = {**COMMITS, HUNYUAN: "c" * 40}
    with pytest.raises(UserError, match=f"was started with {HUNYUAN} at a+ \\(main\\), not at c+"):
        fetch(tmp_path, revisions={HUNYUAN: "c" * 40}, endpoint=endpoint(hub))
    hub.commits = COMMITS
    fetch(tmp_path, endpoint=endpoint(hub))
    assert record(tmp_path) == COMMITS


def test_an_unreachable_hub_is_reported_with_the_remedy(tmp_path):
    """P6: the error is no traceback of an HTTP library, and no unresolved commit is recorded."""
    with pytest.raises(UserError, match="use --from to copy from a local folder"):
        fetch(tmp_path, endpoint="http://127.0.0.1:9")
    assert not (tmp_path / "fetch.json").exists()


def test_plain_local_folders_make_the_same_tree(repos, tmp_path):
    """Offline: org/name folders can be used instead of the hub."""
    fetch(tmp_path, local=repos, fp8=True)
    assert verify(CheckpointTree(tmp_path), DiTConfig(**TOY_DIT)) == []
    assert (tmp_path / TRANSFORMERS / "mp_rank_00_model_states_fp8.pt").is_file()
    assert not (tmp_path / "assets.mp4").exists()
    assert set(record(tmp_path).values()) == {"unknown: a plain folder"}
    fetch(tmp_path, local=repos)


def test_a_hubs_cache_makes_the_same_tree(repos, tmp_path):
    """Offline: a hub cache has models--org--name/ with refs, and snapshots of links into blobs."""
    for name, commit in COMMITS.items():
        cached = tmp_path / "cache" / f"models--{name.replace('/', '--')}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        (cached / "blobs").mkdir()
        for number, path in enumerate(path for path in (repos / name).rglob("*") if path.is_file()):
            blob = Path(shutil.copy(path, cached / "blobs" / str(number)))
            link = cached / "snapshots" / commit / path.relative_to(repos / name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    fetch(tmp_path / "out", local=tmp_path / "cache")
    assert verify(CheckpointTree(tmp_path / "out"), DiTConfig(**TOY_DIT)) == []
    assert record(tmp_path / "out") == COMMITS
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    with pytest.raises(UserError, match=r"has no snapshot v9\. Snapshots: a+"):
        fetch(tmp_path / "other", local=tmp_path / "cache", revisions={HUNYUAN: "v9"})


def test_the_command_prints_the_licence_notice(repos, tmp_path):
    """stderr has the licence notice and stdout the folder; a revision must have the form REPOSITORY=COMMIT."""
    done = CliRunner().invoke(app, ["weights", "fetch", str(tmp_path), "--from", str(repos)])
    assert done.exit_code == 0
    assert "European Union" in done.stderr
    assert done.stdout.strip() == str(tmp_path)
    done = CliRunner().invoke(app, ["weights", "fetch", str(tmp_path), "--revision", "main"])
    assert "Expected REPOSITORY=COMMIT" in str(done.exception)


def test_unknown_repositories_and_missing_copies_are_refused(repos, tmp_path):
    """P6: the message names the repositories of the layout, or the folders in which a local copy was expected."""
    with pytest.raises(UserError, match=r"unknown repository a/b\. Repositories of this layout: tencent/HunyuanVideo"):
        fetch(tmp_path, local=repos, revisions={"a/b": "main"})
    with pytest.raises(UserError, match="holds no copy of hunyuanvideo-community/HunyuanVideo"):
        fetch(tmp_path, local=repos, layout="diffusers")
    with pytest.raises(UserError, match="holds no copy of tencent/HunyuanVideo"):
        fetch(tmp_path, local=tmp_path / "nowhere")


def test_pinned_commits_are_full_hashes():
    """A short hash or a branch would be resolved again at each fetch."""
    pinned = [repo.revision for repo in (*RELEASED, *DIFFUSERS) if repo.revision != "main"]
    assert len(pinned) == 2
    assert all(len(commit) == 40 and int(commit, 16) for commit in pinned)
