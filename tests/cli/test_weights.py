"""`hv-batch weights`: checkpoints are inspected, converted and extracted; incomplete output is never used."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hv_batch.architecture import DiTConfig
from hv_batch.cli.main import app
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.loading import load_dit, load_vae, verify
from hv_batch.engine.checkpoint.tensor_files import stored
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.engine.dit.fp8_storage import FP8, block_linears, dequantise
from hv_batch.engine.hunyuan import HunyuanVideo
from hv_batch.engine.text_encoders import TextTowers
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from hv_batch.weights import shards
from hv_batch.weights.conversion import Recipe, convert
from hv_batch.weights.deep_check import find_damage
from hv_batch.weights.extraction import extract_text_encoder
from hv_batch.weights.inventory import take_inventory

CPU = torch.device("cpu")
CONFIG = DiTConfig(**TOY_DIT)
MODEL = "hunyuan-video-t2v-720p"
DIT = f"{MODEL}/transformers/mp_rank_00_model_states.pt"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def base(toy, tmp_path):
    return shutil.copytree(toy, tmp_path / "ckpts")


def dit_of(base, dtype=torch.bfloat16, fp8="none", **tree):
    return load_dit(CheckpointTree(base, **tree), CONFIG, "sdpa", dtype, CPU, fp8).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ---- convert


def test_a_converted_tree_is_the_same_model(toy, tmp_path):
    """The engine loads the converted tree, in several shards, and every tensor has equal bits."""
    convert(toy, tmp_path / "out", Recipe(shard_bytes=2 * 10**6))
    tree = CheckpointTree(tmp_path / "out")
    assert verify(tree, CONFIG) == []
    assert tree.dit_file().name == "model.safetensors.index.json"
    assert len(list(tree.dit_file().parent.glob("model-*.safetensors"))) == 3
    assert equal(dit_of(toy), dit_of(tmp_path / "out"))
    vaes = [load_vae(CheckpointTree(base), torch.float32, CPU).state_dict() for base in (toy, tmp_path / "out")]
    assert equal(*vaes)
    towers = TextTowers(tree.text_encoder, tree.text_encoder_2, device=CPU, dtype=torch.float32)
    assert towers.encode(["a cat"], image=True)[0].num_tokens == 2
    assert not [name for name in files(tmp_path / "out") if name.endswith(".part")]


def test_converted_weights_can_be_memory_mapped(tmp_path):
    """Tensors whose size is a multiple of the alignment are aligned in the file, so that loading does not copy them."""
    odd = {"a": torch.zeros(3, dtype=torch.uint8), "b": torch.zeros(5), "c": torch.zeros(7, dtype=torch.bfloat16)}
    large = {"x": torch.zeros(64, dtype=FP8), "y": torch.zeros(8, 8), "z": torch.zeros(32, dtype=torch.bfloat16)}
    shards.write_file(tmp_path / "f.safetensors", {k: stored(t) for k, t in {**odd, **large}.items()}, "here")
    file = safe_open(tmp_path / "f.safetensors", framework="pt")
    assert [file.get_tensor(name).data_ptr() % 64 for name in large] == [0, 0, 0]
    assert equal(load_file(tmp_path / "f.safetensors"), odd | large)


def test_fp8_conversion_is_in_the_released_form(toy, tmp_path):
    """Spec section 6: the Linears inside the blocks are FP8 with one scale each; the error is that of rounding."""
    convert(toy / DIT, tmp_path / "out", Recipe(fp8=True))
    held = dit_of(toy, fp8="storage", dit_weight=tmp_path / "out")
    assert {name.removesuffix(".scale") for name in held if name.endswith(".scale")} == {
        name for name in block_linears(load_dit(CheckpointTree(toy), CONFIG, "sdpa", torch.bfloat16, CPU))
    }
    original = dit_of(toy)
    for name, tensor in original.items():
        if held[name].dtype == FP8:
            back = dequantise(held[name], held[f"{name.removesuffix('.weight')}.scale"], torch.bfloat16)
            # Half a step of 3 mantissa bits, or of the smallest numbers, plus the rounding of the product to bf16.
            error = (back.float() - tensor.float()).abs()
            assert (error <= tensor.float().abs() / 16 * 1.07 + tensor.float().abs().max() / 448 / 512).all()
        else:
            assert torch.equal(held[name], tensor)

    convert(tmp_path / "out", tmp_path / "again", Recipe(fp8=True))  # FP8 weights are not changed
    assert equal(held, dit_of(toy, fp8="storage", dit_weight=tmp_path / "again"))
    convert(tmp_path / "out", tmp_path / "back", Recipe())
    assert equal(dit_of(toy, dit_weight=tmp_path / "out"), dit_of(toy, dit_weight=tmp_path / "back"))


def test_dtype_applies_to_the_dit_only(toy, tmp_path):
    """The VAE is released in fp32 and run in fp16: a conversion to bf16 would change pixels."""
    convert(toy, tmp_path / "out", Recipe(dtype=torch.float16))
    parts = {part.name: part for part in take_inventory(tmp_path / "out").parts}
    assert set(parts["DiT"].dtypes) == {"float16"}
    assert set(parts["VAE"].dtypes) == {"float32"}
    assert equal(dit_of(tmp_path / "out", torch.float16), dit_of(toy, torch.float16))


def test_a_killed_conversion_resumes(toy, tmp_path, monkeypatch):
    """P2: complete shards are kept, an incomplete one is not, and the index is written last; the result is equal."""
    recipe = Recipe(fp8=True, shard_bytes=10**6)
    convert(toy, tmp_path / "whole", recipe)
    header, calls = shards._header, []

    def fail_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return header(*args)

    monkeypatch.setattr(shards, "_header", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        convert(toy, tmp_path / "out", recipe)
    folder = tmp_path / "out" / MODEL / "transformers"
    (first,) = [name for name in files(folder) if name != "config.json"]
    assert first.startswith("model-00001-of-")
    written = (folder / first).stat().st_mtime_ns
    monkeypatch.setattr(shards, "_header", header)
    convert(toy, tmp_path / "out", recipe)
    assert (folder / first).stat().st_mtime_ns == written
    assert revision(CheckpointTree(tmp_path / "out")) == revision(CheckpointTree(tmp_path / "whole"))
    convert(toy, tmp_path / "out", recipe)  # a further run changes nothing
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_shards_of_another_source_or_recipe_are_refused(toy, base, tmp_path):
    """Shards of two models in one folder would load, and render noise."""
    convert(toy / DIT, tmp_path / "out", Recipe())
    with pytest.raises(UserError, match="was made from another source"):
        convert(toy / DIT, tmp_path / "out", Recipe(fp8=True))
    state = torch.load(base / DIT, weights_only=True)
    state["module"]["img_in.proj.bias"] += 1
    torch.save(state, base / DIT)
    with pytest.raises(UserError, match="was made from another source"):
        convert(base / DIT, tmp_path / "out", Recipe())


def test_impossible_conversions_are_refused_before_they_start(toy, base, tmp_path, monkeypatch):
    """P6: a missing or incomplete source, a target inside the source, a full disk: nothing is written."""
    with pytest.raises(UserError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out", Recipe())
    with pytest.raises(UserError, match="is inside the source"):
        convert(toy, toy / "out", Recipe())
    shutil.rmtree(base / "text_encoder")
    with pytest.raises(UserError, match="The source is incomplete"):
        convert(base, tmp_path / "out", Recipe())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="GB free"):
        convert(toy, tmp_path / "out", Recipe())
    assert not (tmp_path / "out").exists()


def test_the_config_of_the_dit_is_converted(base, tmp_path):
    """A config.json of class HYVideoDiT next to the DiT replaces the engine's `dit` option, also after a conversion."""
    path = base / MODEL / "transformers" / "config.json"
    path.write_text(json.dumps({"_class_name": "HYVideoDiT", **TOY_DIT}))
    assert HunyuanVideo(model_base=base).check() == []
    convert(base, tmp_path / "out", Recipe())
    assert HunyuanVideo(model_base=tmp_path / "out").check() == []
    path.write_text(json.dumps({"_class_name": "SomethingElse", "hidden_size": 7}))
    assert "does not fit the configured model" in HunyuanVideo(model_base=base).check()[0]


# ---- extract


def llava(folder, toy, prefixes):
    """Write a LLaVA with the toy's LLaMA, in two shards; its config omits fields that equal the defaults."""
    config = LlamaConfig.from_pretrained(toy / "text_encoder")
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.model = AutoModel.from_pretrained(toy / "text_encoder")
    language, head, other = prefixes
    state = {f"{language}{name}": tensor for name, tensor in model.model.state_dict().items()}
    state[f"{head}lm_head.weight"] = model.lm_head.weight.detach()
    extra = {f"{other}vision_tower.x.weight": torch.zeros(3), f"{other}multi_modal_projector.y.bias": torch.zeros(2)}
    folder.mkdir()
    halves = {"model-00001-of-00002.safetensors": state, "model-00002-of-00002.safetensors": extra}
    for file, tensors in halves.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in halves.items() for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    text = json.loads((toy / "text_encoder" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy / "text_encoder" / name, folder / name)
    (folder / "preprocessor_config.json").write_text("{}")
    return folder, model


OLD = ("language_model.model.", "language_model.", "")  # before transformers 4.52, as in the checkpoint of xtuner
NEW = ("model.language_model.", "", "model.")


@pytest.mark.parametrize("prefixes", [OLD, NEW], ids=["old names", "new names"])
def test_the_language_model_is_extracted(toy, tmp_path, prefixes):
    """All tensors of the language model, and no others, have the names of a LlamaForCausalLM; its states are equal."""
    folder, model = llava(tmp_path / "llava", toy, prefixes)
    extract_text_encoder(folder, tmp_path / "out")
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert equal(load_file(shard), model.state_dict())
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.architectures == ["LlamaForCausalLM"]
    encoded = [
        TextTowers(llama, toy / "text_encoder_2", device=CPU, dtype=torch.float32).encode(["a cat"], image=False)[0]
        for llama in (tmp_path / "out", toy / "text_encoder")
    ]
    assert torch.equal(encoded[0].states, encoded[1].states)


def test_a_config_without_the_defaults_is_completed(toy, tmp_path):
    """The released config omits widths that equal transformers' defaults, which another version may change."""
    folder, _ = llava(tmp_path / "llava", toy, OLD)
    config = json.loads((folder / "config.json").read_text())
    del config["text_config"]["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="num_hidden_layers 32, but the weights in this folder have fewer layers"):
        extract_text_encoder(folder, tmp_path / "out")
    shard = folder / "model-00001-of-00002.safetensors"
    last = {"language_model.model.layers.31.input_layernorm.weight": torch.ones(64)}
    save_file(load_file(shard) | last, shard)
    extract_text_encoder(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 32
    assert written["hidden_size"] == 64


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json does not exist"),
        (
            lambda f: (f / "model-00001-of-00002.safetensors").unlink(),
            "does not exist, but model.safetensors.index.json",
        ),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "is not the config of a LLaVA with a"),
        (
            lambda f: (f / "config.json").write_text(
                '{"text_config": {"model_type": "llama", "hidden_size": "64", "num_hidden_layers": 1e9}}'
            ),
            "config.json, text_config: hidden_size is '64', allowed is a whole .*; num_hidden_layers is 1000000000",
        ),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "holds no LLaVA weights"),
    ],
)
def test_folders_that_are_not_a_llava_are_refused(toy, tmp_path, damage, message):
    """P6: the message names what is missing, and nothing is written."""
    folder, _ = llava(tmp_path / "llava", toy, OLD)
    damage(folder)
    with pytest.raises(UserError, match=message):
        extract_text_encoder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- check


def test_a_complete_tree_is_reported_with_its_revision(toy):
    """The inventory has sizes, dtypes, parameter counts, and the revision that is part of the identity of a run."""
    inventory = take_inventory(toy)
    assert inventory.problems == []
    assert inventory.revision == revision(CheckpointTree(toy))
    parts = {part.name: part for part in inventory.parts}
    assert list(parts) == ["DiT", "VAE", "LLaMA", "CLIP"]
    state = torch.load(toy / DIT, weights_only=True)["module"]
    assert parts["DiT"].parameters == sum(tensor.numel() for tensor in state.values())
    assert parts["DiT"].dtypes == {"bfloat16": parts["DiT"].parameters}
    assert parts["DiT"].nbytes == (toy / DIT).stat().st_size
    assert "width 128, 8 heads, 2 double and 2 single blocks" in parts["DiT"].note


def test_missing_and_damaged_parts_are_reported_with_the_others(base):
    """P6: the inventory lists the problems and the intact parts, and has no revision."""
    (base / DIT).unlink()
    (base / MODEL / "vae" / "config.json").write_text("{")
    inventory = take_inventory(base)
    assert inventory.revision is None
    assert {part.name for part in inventory.parts} == {"LLaMA", "CLIP"}
    assert any("mp_rank_00_model_states.pt does not exist" in problem for problem in inventory.problems)


def test_tensors_that_do_not_fit_the_dit_are_named(base):
    """The first mismatching tensors are named, relative to the widths of the file itself."""
    content = torch.load(base / DIT, weights_only=True)
    content["module"]["single_blocks.1.linear2.weight"] = torch.zeros(3, 3)
    content["module"]["lora.up"] = torch.zeros(3)
    torch.save(content, base / DIT)
    (problem,) = take_inventory(base).problems
    assert "single_blocks.1.linear2.weight is [3, 3], must be [128, 640]" in problem
    assert "1 not of this model (lora.up)" in problem
    save_file({"a": torch.zeros(1)}, base / "other.safetensors")
    (problem,) = take_inventory(base / "other.safetensors").problems
    assert "1 not of this model (a)" in problem


def test_a_folder_without_a_checkpoint_is_refused_with_the_layout(tmp_path):
    """P6: the message does not call it a damaged DiT."""
    with pytest.raises(UserError, match=r"is not a model_base and has no DiT weights\. The layout is"):
        take_inventory(tmp_path)


def test_a_single_dit_can_be_inspected(toy, tmp_path):
    """A DiT may be a folder of shards; the map of the FP8 scales is one of its files."""
    convert(toy / DIT, tmp_path / "out", Recipe(fp8=True))
    (part,) = take_inventory(tmp_path / "out").parts
    assert part.files == 3
    assert list(part.dtypes) == ["float8_e4m3fn", "bfloat16"]
    (tmp_path / "out" / "model_map.safetensors").unlink()
    assert "model_map.safetensors" in take_inventory(tmp_path / "out").problems[0]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "is 0"), (-1.0, "is -1"), (float("nan"), "is nan"), (float("inf"), "is inf")]
)
def test_scales_that_are_not_finite_numbers_above_zero_are_refused(toy, tmp_path, value, shown):
    """P6: with such a scale a whole matrix becomes zero, negated or infinite."""
    convert(toy / DIT, tmp_path / "out", Recipe(fp8=True))
    path = tmp_path / "out" / "model_map.safetensors"
    scales = load_file(path)
    name = sorted(scales)[0]
    save_file(scales | {name: torch.tensor(value)}, path)
    (problem,) = take_inventory(tmp_path / "out").problems
    assert f"{path} must contain finite scales above 0, but {name} {shown}:" in problem
    save_file(scales | {name: torch.tensor(1, dtype=torch.int32)}, path)
    assert f"but {name} is nan" in take_inventory(tmp_path / "out").problems[0]


@pytest.mark.parametrize(
    ("weight_map", "shown"),
    [
        ({"a": "../outside.safetensors"}, "'../outside.safetensors'"),
        ({"a": "/etc/passwd"}, "'/etc/passwd'"),
        ({"a": "passwd"}, "'passwd'"),
        ({"a": ""}, "''"),
        ({"a": ["x.safetensors"]}, "\"['x.safetensors']\""),
        ({"a": 3}, "'3'"),
    ],
)
def test_an_index_that_names_paths_is_refused(base, weight_map, shown):
    """P6: an index names files beside it; one that leads elsewhere is not read."""
    (base / "text_encoder" / "model.safetensors").rename(base / "outside.safetensors")
    index = base / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert any(
        f"{index} is not a valid index: its weight_map names {shown}" in one for one in take_inventory(base).problems
    )
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": []}'):
        index.write_text(text)
        assert any(f"{index} is damaged or not an index" in one for one in take_inventory(base).problems)


def flip_a_byte(path, at=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 0x10
    path.write_bytes(content)


def test_a_deep_check_finds_damage_that_headers_do_not_show(base):
    """`--deep` compares the checksums of .pt files and the sizes of safetensors files with what is stored."""
    assert take_inventory(base, deep=True).problems == []
    flip_a_byte(base / DIT)
    assert take_inventory(base).problems == []
    inventory = take_inventory(base, deep=True)
    (problem,) = inventory.problems
    assert f"{base / DIT} is damaged: the checksums of 1 of" in problem
    assert inventory.revision is None
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.zeros(5)}, base / "no-checksums.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert "or it was written without checksums" in next(find_damage([base / "no-checksums.pt"]))
    longer = base / "text_encoder" / "model.safetensors"
    size = longer.stat().st_size
    longer.write_bytes(longer.read_bytes() + b"x")
    assert f"it has {size + 1} bytes, but its header describes {size}" in next(find_damage([longer]))


def test_a_deep_check_finds_values_that_are_not_finite(base):
    """Such weights turn every sample into NaN on the first GPU."""
    path = base / "text_encoder_2" / "model.safetensors"
    tensors = load_file(path)
    tensors["text_model.final_layer_norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    (problem,) = take_inventory(base, deep=True).problems
    assert f"{path} has 1 tensor(s) with NaN or infinity (text_model.final_layer_norm.weight)" in problem
    (line,) = [line for line in run("check", base, "--deep")[1].split("\n") if "problem" in line]
    assert problem in line


def test_a_deep_check_reads_8_bit_weights(toy, tmp_path):
    """FP8 has NaN but no infinity."""
    convert(toy / DIT, tmp_path / "out", Recipe(fp8=True))
    assert take_inventory(tmp_path / "out", deep=True).problems == []


# ---- the commands


def run(*arguments):
    done = CliRunner().invoke(app, ["weights", *map(str, arguments)])
    return done.exit_code, done.output, done.exception


def test_the_commands_report_their_results(toy, base, tmp_path):
    """`check` prints text or JSON and exits with 1 if there are problems; the others write their targets."""
    code, text, _ = run("check", toy)
    assert code == 0
    assert all(f"{part:<15} {digest}" in text for part, digest in revision(CheckpointTree(toy)).items())
    code, text, _ = run("check", toy, "--json")
    assert json.loads(text)["parts"][0]["parameters"] > 10**6
    (base / DIT).unlink()
    code, text, _ = run("check", base)
    assert code == 1
    assert "problem: DiT weights missing" in text

    code, text, _ = run("convert", toy, tmp_path / "out", "--to", "safetensors", "--dtype", "bf16", "--fp8")
    assert code == 0
    assert verify(CheckpointTree(tmp_path / "out"), CONFIG, "storage") == []
    assert isinstance(run("check", tmp_path / "nowhere")[2], UserError)
    folder, _ = llava(tmp_path / "llava", toy, OLD)
    assert run("extract-text-encoder", folder, tmp_path / "text_encoder")[0] == 0
    assert (tmp_path / "text_encoder" / "model.safetensors.index.json").is_file()
