"""Small runs of real manifests, whose roots continue with a grown manifest or an allowed change."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hv_batch.job import layout
from hv_batch.job.config.run_config import RunConfig
from hv_batch.job.inspection.findings import Verification
from hv_batch.job.inspection.verify import MediaShape, verify
from hv_batch.job.manifest.check import check_manifest
from hv_batch.job.manifest.index import load_index
from hv_batch.job.manifest.reader import Manifest
from hv_batch.job.records.continuation import begin_run, inspect_continuation
from hv_batch.job.records.run_document import RunState
from hv_batch.job.records.run_identity import REVISION
from hv_batch.job.storage.store import Store
from tests.support.small_runs import run_small

SHAPE = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 4}


def rows_of(count: int, **columns) -> list[dict]:
    return [{"id": f"s{number:03d}", "prompt": f"take {number}", **columns} for number in range(1, count + 1)]


@dataclass(frozen=True)
class Command:
    """One run command: the rows of its manifest, its config and its flags."""

    manifest: Path
    rows: Sequence[Mapping]
    sections: Mapping[str, Mapping] = field(default_factory=dict)
    seed: int = 0
    model: str = "a"  # what the engine's identity says
    hook_results: str = ""  # what a prompt hook has answered, if there is one
    allowed: Collection[str] = ()
    poison: Collection[str] = ()

    def config(self) -> RunConfig:
        sections = {"defaults": {}, "output": {}, "parallel": {}, **self.sections}
        return RunConfig.model_validate(
            {
                "seed": self.seed,
                **sections,
                "defaults": {**SHAPE, **sections["defaults"]},
                "output": {"shard_size": 4, **sections["output"]},
                "parallel": {"device": "cpu", "ulysses_degree": 1, **sections["parallel"]},
                "groups": {"gpus_per_rank": 0, "cpus_per_rank": 1},
                "encoders": {"gpus": 0},
                "decoders": {"gpus": 0},
            }
        )

    def check(self, store: Store):
        """The index, the document of run.json, and what `inspect_continuation` says: as `prepare_run`."""
        self.manifest.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        config, manifest = self.config(), Manifest(str(self.manifest))
        index = load_index(store, manifest, config) or check_manifest(
            manifest, config, Store(f"memory://{uuid.uuid4().hex}")
        )
        document = document_of(config, index.summary, self.model)
        if self.hook_results:
            document["identity"]["hooks"] = {"prompt": {"name": "rewrite", "results": self.hook_results}}
        found = inspect_continuation(store, document, index, config, self.allowed)
        return index, document, found

    def run(self, store: Store, denoised: Counter | None = None) -> None:
        """As `render`. `denoised` counts denoises by key."""
        index, document, (state, continuation) = self.check(store)
        if state is not RunState.FINISHED:
            begin_run(store, document, index, continuation)
            run_small(store, (), poison=self.poison, denoised=denoised, index=index)


def document_of(config: RunConfig, summary, model: str = "a") -> dict:
    """The document of a run.json, with the identity of the parts that these runs have."""
    values = config.model_dump(mode="json")
    identity = {
        "revision": REVISION,
        "seed": config.seed,
        "engine": config.model.engine,
        "defaults": values["defaults"],
        "parallel": {"device": "cpu", "ulysses_degree": 1, "ring_degree": 1},
        "media": {name: value for name, value in values["media"].items() if name != "poster"},
        "shard_size": config.output.shard_size,
        "webdataset": config.output.webdataset,
        "model": {"weights": model},
        "manifest": summary.digest,
    }
    manifest = {
        "url": "m.jsonl",
        "digest": summary.digest,
        "rows": summary.rows,
        "samples": summary.samples,
        "shards": summary.shards,
    }
    return {"identity": identity, "config": values, "manifest": manifest, "versions": {}}


def verified(store: Store) -> Verification:
    return verify(store, lambda data, suffix: MediaShape(5, 32, 32), decodes=None)


def copied(store: Store) -> str:
    """The URL of a copy of a root in memory."""
    copy = Store(f"memory://{uuid.uuid4().hex}")
    folders = ("commits", "data", "lineage", "plan", "quarantine", "report", "retried")
    names = [name for folder in folders for name in store.list(folder)]
    for name in (*names, layout.RUN, layout.SUMMARY, layout.SUCCESS, layout.CARD):
        if store.exists(name):
            copy.put(name, store.get(name))
    return copy.url
