"""Config files, overrides and checkpoint files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save

from hv_batch.cli.sample.files import read_latents
from hv_batch.engine.checkpoint.lora.alphas import read_alpha_rules
from hv_batch.engine.checkpoint.tensor_files import CPU, StoredTensor, named_tensors, open_file
from hv_batch.job.config.run_config import build_config, load_config
from tests.fuzz.mutations import mutate, mutate_json
from tests.support.repository import CONFIGS

CONFIG = b"".join(path.read_bytes() for path in sorted(CONFIGS.glob("*1gpu.yaml"))[:1]) + b"\nseed: 5 # a comment\n"
TENSORS = {"latents": torch.ones(16, 1, 2, 2), "a.weight": torch.ones(3, 4, dtype=torch.bfloat16), "b": torch.ones(0)}
ADAPTER = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"x": 2}}
METADATA = {
    "record": json.dumps({"prompt": "a", "seed": 1}),
    "lora_adapter_metadata": json.dumps(ADAPTER),
}
SAFETENSORS = save(TENSORS, metadata=METADATA)


def read_config(data: bytes, folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_bytes(data)
    load_config(str(path))


def read_override(data: bytes, folder: Path) -> None:
    build_config("c.yaml", {}, [data.decode("utf-8", "surrogateescape")])


def read_weights(data: bytes, folder: Path) -> None:
    """The tensors of a file, with their values."""
    path = folder / "w.safetensors"
    path.write_bytes(data)
    _read_all(path)


def read_latents_file(data: bytes, folder: Path) -> None:
    path = folder / "l.safetensors"
    path.write_bytes(data)
    read_latents(path)


def read_lora(data: bytes, folder: Path) -> None:
    path = folder / "lora.safetensors"
    path.write_bytes(data)
    open_file(path)
    read_alpha_rules(path)


def read_pickle(data: bytes, folder: Path) -> None:
    path = folder / "w.pt"
    path.write_bytes(data)
    named_tensors(open_file(path), path)


def read_index(data: bytes, folder: Path) -> None:
    (folder / "w.safetensors").write_bytes(SAFETENSORS)
    path = folder / "w.safetensors.index.json"
    path.write_bytes(data)
    open_file(path)


def _read_all(path: Path) -> None:
    for tensor in named_tensors(open_file(path), path).values():
        if isinstance(tensor, StoredTensor) and tensor.nbytes < 1 << 20:
            tensor.read(CPU, tensor.dtype)


def damage_header(data: bytes, rng: Random) -> bytes:
    """Changes the JSON header of a safetensors file, mostly with a correct length before it."""
    if rng.random() < 0.3:
        return mutate(data, rng)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if rng.random() < 0.5:  # the JSON texts inside the header
        name = rng.choice(sorted(METADATA))
        inner = mutate_json(METADATA[name].encode(), rng).decode("utf-8", "replace")
        header["__metadata__"][name] = inner
        text = json.dumps(header).encode()
    else:
        text = mutate_json(json.dumps(header).encode(), rng)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def damage_override(data: bytes, rng: Random) -> bytes:
    key = rng.choice((b"seed", b"defaults.height", b"groups.count", b"model.loras", b"model.options", b"a.b", b""))
    return key + b"=" + mutate(rng.choice((b"5", b"[1, 2]", b"{a: 1}", b'"x"', b"", b"2026-11-29", b"1:30")), rng)


def _pickle() -> bytes:
    sink = io.BytesIO()
    torch.save(TENSORS, sink)
    return sink.getvalue()


INDEX = json.dumps({"metadata": {"total_size": 1}, "weight_map": {name: "w.safetensors" for name in TENSORS}}).encode()

TARGETS = {
    "config": (CONFIG, mutate, read_config),
    "latents-file": (SAFETENSORS, damage_header, read_latents_file),
    "lora": (SAFETENSORS, damage_header, read_lora),
    "override": (b"", damage_override, read_override),
    "weights-index": (INDEX, mutate_json, read_index),
    "weights-pickle": (_pickle(), mutate, read_pickle),
    "weights-safetensors": (SAFETENSORS, damage_header, read_weights),
}
