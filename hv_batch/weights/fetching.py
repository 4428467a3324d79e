"""Fetch weights from the Hugging Face Hub, or from a local copy of it, into a tree that the engine loads.

    tencent/HunyuanVideo                        -> <target>/hunyuan-video-t2v-720p/
    xtuner/llava-llama-3-8b-v1_1-transformers   -> its language model and tokenizer -> <target>/text_encoder/
    openai/clip-vit-large-patch14               -> <target>/text_encoder_2/

or, in diffusers' layout, hunyuanvideo-community/HunyuanVideo -> <target>/, or one repository of distilled weights,
which holds the whole tree in the released layout.

A branch such as "main" moves. It is therefore resolved to a commit once, at the first fetch into a folder, and the
commit is written to <target>/fetch.json before the first download. Later fetches into this folder use the same commit.
An interrupted fetch resumes when the same command is run again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from hv_batch.engine.checkpoint.json_files import read_json
from hv_batch.engine.checkpoint.tree import MODEL
from hv_batch.protocol import UserError
from hv_batch.weights.conversion import link_or_copy
from hv_batch.weights.distilled import DISTILLED
from hv_batch.weights.extraction import TOKENIZER_FILES, extract_text_encoder
from hv_batch.weights.shards import OnBytes, ignore_bytes, write_text

RECORD = "fetch.json"
LLAVA = "xtuner/llava-llama-3-8b-v1_1-transformers"

_TRANSFORMERS = f"{MODEL}/transformers/mp_rank_00_model_states"
_STAGING = ".llava"  # folder of LLaVA until its language model is extracted


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository of the hub, the patterns of the files to fetch, and their folder in the target."""

    name: str
    revision: str  # default revision: a tested commit, or a branch
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
_TREE = (f"{MODEL}/vae/*", "text_encoder/*", "text_encoder_2/*", "README.md", "LICENSE*", "Notice*")
LAYOUTS: Mapping[str, tuple[Repo, ...]] = {
    "released": RELEASED,
    "diffusers": DIFFUSERS,
    **{
        weights.name.lower(): (Repo(weights.repository, "main", (weights.dit_weight or f"{_TRANSFORMERS}.pt", *_TREE)),)
        for weights in DISTILLED
    },
}
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
    """Fill `target` with the weights of a layout, one of `LAYOUTS`; with `fp8`, also with the released FP8 file.

    `revisions` maps repositories to commits, tags or branches. `local` is a folder to copy from instead of the hub: a
    hub cache (models--org--name/) or plain folders (org/name/). Raises UserError if files cannot be fetched, or if
    `target` was started with another revision.
    """
    repos = LAYOUTS[layout]
    requested = dict(revisions or {})
    if unknown := requested.keys() - {repo.name for repo in repos}:
        raise UserError(
            f"--revision: unknown repository {', '.join(sorted(unknown))}. Repositories of this layout: "
            f"{', '.join(repo.name for repo in repos)}."
        )
    target.mkdir(parents=True, exist_ok=True)
    for repo in repos:
        if repo.name == LLAVA and (target / "text_encoder" / "model.safetensors.index.json").is_file():
            continue
        patterns = repo.patterns + (_FP8 if fp8 and repo.name == "tencent/HunyuanVideo" else ())
        if local is not None:
            source = _local_copy(local, repo.name, requested.get(repo.name))
            _pin(target, repo, requested, source.commit)
            if repo.name == LLAVA:
                extract_text_encoder(source.folder, target / "text_encoder", on_bytes)
            else:
                _copy(source.folder, target / repo.folder, patterns, repo.name)
            continue
        commit = _pinned(target, repo, requested) or _pin(target, repo, requested, _resolve(repo, requested, endpoint))
        _download(repo, commit, target / repo.folder, patterns, endpoint)
        if repo.name == LLAVA:
            extract_text_encoder(target / _STAGING, target / "text_encoder", on_bytes)
            shutil.rmtree(target / _STAGING)


def _pinned(target: Path, repo: Repo, requested: Mapping[str, str]) -> str | None:
    """Return the commit that `target` was started with, if any. Raises UserError if another revision is requested."""
    record = read_json(target / RECORD) if (target / RECORD).is_file() else {}
    if repo.name not in record:
        return None
    pinned = record[repo.name]
    if requested.get(repo.name, pinned["revision"]) not in (pinned["revision"], pinned["commit"]):
        raise UserError(
            f"{target} was started with {repo.name} at {pinned['commit']} ({pinned['revision']}), not at "
            f"{requested[repo.name]}. Fetch another revision into another folder."
        )
    return str(pinned["commit"])


def _pin(target: Path, repo: Repo, requested: Mapping[str, str], commit: str) -> str:
    if (pinned := _pinned(target, repo, requested)) not in (None, commit):
        raise UserError(f"{target} was started with {repo.name} at {pinned}, not at {commit}. Choose another folder.")
    record: dict[str, Any] = read_json(target / RECORD) if (target / RECORD).is_file() else {}
    record[repo.name] = {"revision": requested.get(repo.name, repo.revision), "commit": commit}
    write_text(target / RECORD, json.dumps(record, indent=1) + "\n")
    return commit


def _resolve(repo: Repo, requested: Mapping[str, str], endpoint: str | None) -> str:
    from huggingface_hub import HfApi

    revision = requested.get(repo.name, repo.revision)
    try:
        commit = HfApi(endpoint=endpoint).repo_info(repo.name, revision=revision).sha
    except _hub_errors() as error:
        raise UserError(_unreachable(repo.name, revision, error)) from error
    if not commit:
        raise UserError(
            f"The hub returned no commit for {repo.name} at {revision}. Give one with --revision {repo.name}=COMMIT."
        )
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
    """Return the errors of the hub and of the network, for any HTTP library on which the hub client is built."""
    from huggingface_hub.errors import HfHubHTTPError

    return OSError, ValueError, *(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _unreachable(name: str, revision: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0]
    return (
        f"{name} at {revision} could not be fetched: {reason}. Check the network, the name of the revision, and "
        "HF_TOKEN if the repository requires it. Run the same command again to resume the download, or use --from to "
        "copy from a local folder."
    )


@dataclass(frozen=True, slots=True)
class _Copy:
    folder: Path
    commit: str


def _local_copy(local: Path, name: str, revision: str | None) -> _Copy:
    """Find a repository in a local folder: a snapshot of a hub cache, or a plain folder, whose commit is unknown.

    Raises UserError if there is none.
    """
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
            f"{cached} has no snapshot {revision or 'main'}. Snapshots: {', '.join(snapshots) or 'none'}. Choose one "
            f"with --revision {name}=COMMIT."
        )
    if (local / name).is_dir():
        return _Copy(local / name, "unknown: a plain folder")
    raise UserError(f"{local} holds no copy of {name}. Expected {cached} (a hub cache) or {local / name}.")


def _copy(source: Path, target: Path, patterns: Sequence[str], name: str) -> None:
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    wanted = [
        path for path in files if any(fnmatch(path.relative_to(source).as_posix(), pattern) for pattern in patterns)
    ]
    if not wanted:
        raise UserError(f"{source} has none of the files of {name}: {', '.join(patterns)}. Complete the local copy.")
    for path in wanted:
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.is_file() or copy.stat().st_size != path.stat().st_size:
            link_or_copy(path, copy)
