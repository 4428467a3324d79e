"""Weights from the Hugging Face Hub, or from a local copy of it, into a tree that the engine loads.

    tencent/HunyuanVideo                        -> <target>/hunyuan-video-t2v-720p/
    xtuner/llava-llama-3-8b-v1_1-transformers   -> its language model and tokenizer -> <target>/text_encoder/
    openai/clip-vit-large-patch14               -> <target>/text_encoder_2/

or, in diffusers' layout, hunyuanvideo-community/HunyuanVideo -> <target>/.

A name as "main" means another commit tomorrow. So it is resolved once, when a folder is begun, and the commit is
written into <target>/fetch.json before the first byte comes: what is fetched into this folder later is of that commit.
Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.tree import MODEL, read_json
from hv_batch.protocol import UserError
from hv_batch.weights.conversion import link_or_copy
from hv_batch.weights.extraction import TOKENIZER_FILES, extract_text_encoder
from hv_batch.weights.shards import OnBytes, ignore_bytes, write_text

RECORD = "fetch.json"
LLAVA = "xtuner/llava-llama-3-8b-v1_1-transformers"

_TRANSFORMERS = f"{MODEL}/transformers/mp_rank_00_model_states"
_STAGING = ".llava"  # where LLaVA is put until its language model is extracted


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the hub, which of its files are wanted, and into which folder of the target they go."""

    name: str
    revision: str  # a commit where one is known well enough to be the default; else the branch
    patterns: tuple[str, ...]
    folder: str = "."


RELEASED = (
    Repo("tencent/HunyuanVideo", "main", (f"{_TRANSFORMERS}.pt", f"{MODEL}/vae/*", "LICENSE*", "Notice*")),
    Repo(LLAVA, "main", ("config.json", "model*.safetensors", "model*.json", *TOKENIZER_FILES), _STAGING),
    Repo(
        "openai/clip-vit-large-patch14",
        "32bd64288804d66eefd0ccbe215aa642df71cc41",
        ("config.json", "model.safetensors", "tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt"),
        "text_encoder_2",
    ),
)
DIFFUSERS = (
    Repo(
        "hunyuanvideo-community/HunyuanVideo",
        "e8c2aaa66fe3742a32c11a6766aecbf07c56e773",
        (
            "model_index.json",
            "LICENSE*",
            *(f"{part}/*" for part in ("transformer", "vae", "text_encoder", "text_encoder_2")),
            *(f"{part}/*" for part in ("tokenizer", "tokenizer_2", "scheduler")),
        ),
    ),
)
LAYOUTS: Mapping[str, tuple[Repo, ...]] = {"released": RELEASED, "diffusers": DIFFUSERS}
_FP8 = (f"{_TRANSFORMERS}_fp8.pt", f"{_TRANSFORMERS}_fp8_map.pt")


def fetch(
    target: Path,
    *,
    layout: str = "released",
    fp8: bool = False,
    revisions: Mapping[str, str] | None = None,
    local: Path | None = None,
    endpoint: str | None = None,
    on_bytes: OnBytes = ignore_bytes,
) -> None:
    """Fill `target` with the weights of a layout, `fp8` with the released FP8 file beside the bf16 one.

    `revisions` gives commits, tags or branches by repository. `local` is a folder to copy from instead: a hub's cache
    (models--org--name/) or plain folders (org/name/). Raises UserError when something cannot be had, or `target` was
    begun with another revision.
    """
    repos = LAYOUTS[layout]
    asked = dict(revisions or {})
    if unknown := asked.keys() - {repo.name for repo in repos}:
        raise UserError(
            f"--revision names {', '.join(sorted(unknown))}; what is fetched is {', '.join(r.name for r in repos)}."
        )
    target.mkdir(parents=True, exist_ok=True)
    for repo in repos:
        if repo.name == LLAVA and (target / "text_encoder" / "model.safetensors.index.json").is_file():
            continue
        patterns = repo.patterns + (_FP8 if fp8 and repo.name == "tencent/HunyuanVideo" else ())
        if local is not None:
            source = _local_copy(local, repo.name, asked.get(repo.name))
            _pin(target, repo, asked, source.commit)
            if repo.name == LLAVA:
                extract_text_encoder(source.folder, target / "text_encoder", on_bytes)
            else:
                _copy(source.folder, target / repo.folder, patterns, repo.name)
            continue
        commit = _pinned(target, repo, asked) or _pin(target, repo, asked, _resolve(repo, asked, endpoint))
        _download(repo, commit, target / repo.folder, patterns, endpoint)
        if repo.name == LLAVA:
            extract_text_encoder(target / _STAGING, target / "text_encoder", on_bytes)
            shutil.rmtree(target / _STAGING)


def _pinned(target: Path, repo: Repo, asked: Mapping[str, str]) -> str | None:
    """The commit that `target` was begun with; UserError when another is asked for."""
    record = read_json(target / RECORD) if (target / RECORD).is_file() else {}
    if repo.name not in record:
        return None
    begun = record[repo.name]
    if asked.get(repo.name, begun["revision"]) not in (begun["revision"], begun["commit"]):
        raise UserError(
            f"{target} was begun with {repo.name} at {begun['commit']} ({begun['revision']}), not at "
            f"{asked[repo.name]}. Fetch another revision into another folder."
        )
    return str(begun["commit"])


def _pin(target: Path, repo: Repo, asked: Mapping[str, str], commit: str) -> str:
    if (begun := _pinned(target, repo, asked)) not in (None, commit):
        raise UserError(f"{target} was begun with {repo.name} at {begun}, not at {commit}. Choose another folder.")
    record: dict[str, Any] = read_json(target / RECORD) if (target / RECORD).is_file() else {}
    record[repo.name] = {"revision": asked.get(repo.name, repo.revision), "commit": commit}
    write_text(target / RECORD, json.dumps(record, indent=1) + "\n")
    return commit


def _resolve(repo: Repo, asked: Mapping[str, str], endpoint: str | None) -> str:
    from huggingface_hub import HfApi

    revision = asked.get(repo.name, repo.revision)
    try:
        commit = HfApi(endpoint=endpoint).repo_info(repo.name, revision=revision).sha
    except _hub_errors() as error:
        raise UserError(_unreachable(repo.name, revision, error)) from error
    if not commit:
        raise UserError(f"The hub names no commit for {repo.name} at {revision}. Give one with --revision.")
    return str(commit)


def _download(repo: Repo, commit: str, folder: Path, patterns: Sequence[str], endpoint: str | None) -> None:
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            repo.name, revision=commit, local_dir=folder, allow_patterns=list(patterns), endpoint=endpoint
        )
    except _hub_errors() as error:
        raise UserError(_unreachable(repo.name, commit, error)) from error


def _hub_errors() -> tuple[type[Exception], ...]:
    """Refusals of the hub and failures on the way to it, whichever HTTP library the hub's client is built on."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _unreachable(name: str, revision: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{name} at {revision} could not be fetched: {reason}. Check the network, the name of the revision, and "
        "HF_TOKEN where access is granted by it; what has come stays, and the same command goes on. --from takes a "
        "local copy instead."
    )


@dataclass(frozen=True, slots=True)
class _Copy:
    folder: Path
    commit: str


def _local_copy(local: Path, name: str, revision: str | None) -> _Copy:
    """A repository in a local folder: of a hub's cache by its commit, or a plain folder, whose commit nobody knows."""
    cached = local / f"models--{name.replace('/', '--')}"
    if cached.is_dir():
        reference = cached / "refs" / (revision or "main")
        commit = reference.read_text().strip() if reference.is_file() else revision
        snapshots = sorted(path.name for path in (cached / "snapshots").glob("*"))
        if commit is None and len(snapshots) == 1:
            commit = snapshots[0]
        if commit in snapshots:
            return _Copy(cached / "snapshots" / str(commit), str(commit))
        raise UserError(
            f"{cached} has no snapshot {revision or 'main'}; it has {', '.join(snapshots) or 'none'}. Name one with "
            f"--revision {name}=COMMIT."
        )
    if (local / name).is_dir():
        return _Copy(local / name, "unknown: a plain folder")
    raise UserError(f"{local} holds no copy of {name}; expected is {cached} (a hub's cache) or {local / name}.")


def _copy(source: Path, target: Path, patterns: Sequence[str], name: str) -> None:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    wanted = [
        path for path in files if any(fnmatch(path.relative_to(source).as_posix(), pattern) for pattern in patterns)
    ]
    if not wanted:
        raise UserError(f"{source} holds none of the files of {name}: {', '.join(patterns)}. Complete the copy.")
    for path in wanted:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_size != path.stat().st_size:
            link_or_copy(path, copy)
