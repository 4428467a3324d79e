"""Checkpoint trees: detection, validation with messages, exact loading, and revisions."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from hv_batch.architecture import DiTConfig
from hv_batch.engine.checkpoint import digests, tree
from hv_batch.engine.checkpoint.digests import revision
from hv_batch.engine.checkpoint.loading import load_dit, load_vae, verify
from hv_batch.engine.checkpoint.tensor_files import open_file
from hv_batch.engine.checkpoint.tree import CheckpointTree
from hv_batch.protocol import UserError
from hv_batch.toy.checkpoint import TOY_DIT, write_toy_checkpoint
from tests.support.dit_reference import random_inputs

CPU = torch.device("cpu")
CONFIG = DiTConfig(**TOY_DIT)
DIT = "hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt"
VAE = "hunyuan-video-t2v-720p/vae/pytorch_model.pt"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A complete tree, shared by the tests, which must not modify it."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def base(toy, tmp_path):
    """A copy of the tree that a test may modify."""
    return shutil.copytree(toy, tmp_path / "ckpts")


def load(base, **paths):
    return load_dit(CheckpointTree(base, **paths), CONFIG, "sdpa", torch.float32, CPU)


def stored(path):
    return torch.load(path, weights_only=True)


def test_a_complete_tree_has_no_problems(toy):
    """P6: the checks pass on the released layout."""
    assert CheckpointTree(toy).missing() == []
    assert verify(CheckpointTree(toy), CONFIG) == []


@pytest.mark.parametrize(
    "name",
    [
        DIT,
        VAE,
        "hunyuan-video-t2v-720p/vae/config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "text_encoder/tokenizer.json",
        "text_encoder_2/model.safetensors",
    ],
)
def test_a_missing_file_is_named_with_its_path_and_the_layout(base, name):
    """P6: one sentence names the missing file with its expected path; another describes the layout."""
    (base / name).unlink()
    sentence, layout = verify(CheckpointTree(base), CONFIG)
    assert str(base / name) in sentence
    assert "<model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt" in layout


def test_all_missing_files_are_reported_at_once(base):
    """P6: one sentence per missing file, all at once, and the layout once."""
    (base / DIT).unlink()
    (base / VAE).unlink()
    shutil.rmtree(base / "text_encoder_2")
    missing = CheckpointTree(base).missing()
    assert len(missing) == 3
    assert [name in sentence for name, sentence in zip((DIT, VAE, "text_encoder_2"), missing, strict=True)] == [
        True
    ] * 3
    assert verify(CheckpointTree(base), CONFIG) == [*missing, tree.LAYOUT]
    assert not any("layout" in sentence for sentence in missing)
    (sentence,) = CheckpointTree(base / "nowhere").missing()
    assert f"{base / 'nowhere'} is not a folder" in sentence


def test_the_tensors_of_the_file_become_the_module(toy):
    """Spec section 7: every tensor is loaded by its name, in the given precision, without gradients."""
    model = load_dit(CheckpointTree(toy), CONFIG, "math", torch.float16, CPU)
    state = stored(toy / DIT)["module"]
    assert model.attention == "math"
    assert model.config == CONFIG
    assert {name: p.dtype for name, p in model.named_parameters()} == dict.fromkeys(state, torch.float16)
    assert all(torch.equal(p, state[name].half()) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_load_key_picks_the_set_of_tensors(base):
    """Spec section 1, `--load-key`: module or ema; an error for another name lists the names of the file."""
    state = stored(base / DIT)["module"]
    torch.save({"module": state, "ema": {name: tensor + 1 for name, tensor in state.items()}, "step": 3}, base / DIT)
    name = "img_in.proj.bias"
    assert torch.equal(load(base).state_dict()[name], state[name].float())
    assert torch.equal(load(base, load_key="ema").state_dict()[name], (state[name] + 1).float())
    with pytest.raises(UserError, match=r"has no 'EMA' \(the load_key\); its keys are 'module', 'ema', 'step'"):
        load(base, load_key="EMA")


def test_dit_weight_may_be_a_file_or_a_folder(toy, tmp_path):
    """Spec section 1, `--dit-weight`: a file or a folder, with bare tensors, under a key, or as safetensors."""
    wrapped = stored(toy / DIT)
    state = wrapped["module"]
    for folder in ("deepspeed", "bare", "both", "none"):
        (tmp_path / folder).mkdir()
    torch.save(wrapped, tmp_path / "deepspeed" / "mp_rank_00_model_states.pt")
    torch.save({}, tmp_path / "deepspeed" / "mp_rank_00_model_states_fp8.pt")
    torch.save(state, tmp_path / "bare" / "pytorch_model_ema.pt")
    torch.save(wrapped, tmp_path / "both" / "a_model_states.pt")
    torch.save(wrapped, tmp_path / "both" / "b_model_states.pt")
    save_file(state, tmp_path / "dit.safetensors")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)

    expected = load(toy).state_dict()
    for place, key in (
        ("deepspeed", "module"),
        ("bare", "ema"),
        ("bare/pytorch_model_ema.pt", "module"),
        ("dit.safetensors", "module"),
        ("old.pt", "module"),
    ):
        loaded = load(toy, dit_weight=tmp_path / place, load_key=key).state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items()), place
    for place, message in (
        ("both", "several: a_model_states.pt, b_model_states.pt"),
        ("none", "none of these"),
        ("gone.pt", "gone.pt does not exist"),
    ):
        (sentence,) = CheckpointTree(toy, dit_weight=tmp_path / place).missing()
        assert message in sentence
        with pytest.raises(UserError, match=message):
            load(toy, dit_weight=tmp_path / place)


def test_tensors_that_do_not_fit_are_named(base):
    """P6: the error for a checkpoint of another width or depth names the tensors that differ; no GPU is needed."""
    content = stored(base / DIT)
    content["module"]["img_in.proj.bias"] = torch.zeros(7)
    content["module"]["surplus"] = torch.zeros(1)
    del content["module"]["txt_in.input_embedder.weight"]
    torch.save(content, base / DIT)
    (message,) = verify(CheckpointTree(base), CONFIG)
    with pytest.raises(UserError) as error:
        load(base)
    assert str(error.value) == message
    assert str(base / DIT) in message
    assert "1 missing (txt_in.input_embedder.weight)" in message
    assert "1 not of this model (surplus)" in message
    assert "1 of another shape (img_in.proj.bias is [7], must be [128])" in message


def test_another_depth_names_a_few_tensors_not_hundreds(toy):
    """P6: the error for the released width with a toy file is one short paragraph."""
    (message,) = verify(CheckpointTree(toy), DiTConfig())
    assert "missing" in message
    assert "of another shape" in message
    assert len(message) < 1500


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _garble(path):
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 26\n")


def _empty(path):
    path.write_bytes(b"")


def _list_of_tensors(path):
    torch.save([torch.zeros(1)], path)


def _not_tensors(path):
    torch.save({"module": {"epoch": 3}, "state_dict": {"epoch": 3}}, path)


@pytest.mark.parametrize("damage", [_truncate, _garble, _empty, _list_of_tensors, _not_tensors])
@pytest.mark.parametrize(("name", "read"), [(DIT, load), (VAE, None)])
def test_a_damaged_file_is_reported(base, name, read, damage):
    """P6: a truncated file or a Git LFS pointer gives a message, not a traceback."""
    damage(base / name)
    with pytest.raises(UserError, match="copy it again") as error:
        read(base) if read else load_vae(CheckpointTree(base), torch.float32, CPU)
    assert str(base / name) in str(error.value)
    assert verify(CheckpointTree(base), CONFIG) == [str(error.value)]


def test_a_damaged_safetensors_file_is_reported(toy, tmp_path):
    """P6: a truncated safetensors file gives a message, not a traceback."""
    file = tmp_path / "dit.safetensors"
    save_file(stored(toy / DIT)["module"], file)
    _truncate(file)
    with pytest.raises(UserError, match="copy it again"):
        load(toy, dit_weight=file)


class Payload:
    """An object that creates the file `target` if the standard unpickler loads it."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("name", [DIT, VAE])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_checkpoint_cannot_run_code(base, tmp_path, name, zipped):
    """Checkpoints are untrusted: loading returns tensors, or raises an error that names the code it would run."""
    content = {"module": Payload(tmp_path / "owned")}
    torch.save(content, base / name, _use_new_zipfile_serialization=zipped)
    (message,) = verify(CheckpointTree(base), CONFIG)
    assert f"{base / name} contains objects other than tensors: loading it would run io.open" in message
    assert "safetensors" in message
    assert not (tmp_path / "owned").exists()


def test_a_training_state_with_other_objects_is_refused(base):
    """A file with objects other than tensors is not read in part; the error names an object's type."""
    content = stored(base / DIT)
    torch.save(content | {"args": argparse.Namespace(lr=1e-4)}, base / DIT)
    with pytest.raises(UserError, match=r"loading it would run argparse\.Namespace"):
        load(base)


def test_safetensors_in_shards_load_as_one_file_does(toy, tmp_path):
    """The DiT may be a folder with an index and shards; a missing or truncated shard is reported."""
    state = stored(toy / DIT)["module"]
    names = sorted(state)
    halves = {"model-1.safetensors": names[: len(names) // 2], "model-2.safetensors": names[len(names) // 2 :]}
    for file, part in halves.items():
        save_file({name: state[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in halves.items() for name in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    expected = load(toy).state_dict()
    loaded = load(toy, dit_weight=tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())

    _truncate(tmp_path / "model-2.safetensors")
    with pytest.raises(UserError, match=r"model-2.safetensors \(\d+ bytes\) is damaged"):
        load(toy, dit_weight=tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    assert "model-2.safetensors does not exist" in CheckpointTree(toy, dit_weight=tmp_path).missing()[0]
    with pytest.raises(
        UserError, match=r"model-2\.safetensors does not exist, but model\.safetensors\.index\.json names"
    ):
        load(toy, dit_weight=tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "x" * 300 + ".pt", "x\0.pt", "\ud800.pt", 5])
def test_an_index_names_only_files_that_can_be_beside_it(tmp_path, name):
    """P6: a name that no file system has is refused as one that leads elsewhere."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(UserError, match="its weight_map names"):
        open_file(index)


def test_cpu_weights_are_aligned_as_torch_allocates_them(toy, tmp_path):
    """P3: matrix kernels of the CPU sum in another order over weights that are not aligned in their file."""
    state = {name: tensor.float() for name, tensor in stored(toy / DIT)["module"].items()}
    file = tmp_path / "dit.safetensors"
    save_file(state, file, metadata={"pad": "x" * 3})
    aligned = tmp_path / "dit.pt"
    torch.save(state, aligned)
    inputs = random_inputs(CONFIG, (1, 4, 4), [5], seed=0, padded=5)
    a, b = (load(toy, dit_weight=path)(**inputs) for path in (file, aligned))
    assert torch.equal(a, b)
    assert all(p.data_ptr() % 64 == 0 for p in load(toy, dit_weight=file).parameters())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "(0 bytes) is damaged or not a checkpoint: it is empty. Compare"),
        (b"<html>Not found</html>", "(22 bytes) is damaged or not a checkpoint: Unsupported operand 60. Compare"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "is a Git LFS pointer, not the file itself",
        ),
    ],
)
@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_a_failed_download_is_detected(toy, tmp_path, name, content, message):
    """P6: an empty file, a page of a web server and a Git LFS pointer are reported in full sentences."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load(toy, dit_weight=tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert message in str(error.value) or (name == "dit.safetensors" and b"html" in content)


@pytest.mark.parametrize("tower", ["text_encoder", "text_encoder_2"])
def test_a_truncated_text_encoder_is_reported_before_it_is_loaded(base, tower):
    """P6: the check reads the headers of the text encoders too."""
    _truncate(base / tower / "model.safetensors")
    (message,) = verify(CheckpointTree(base), CONFIG)
    assert str(base / tower / "model.safetensors") in message
    assert "damaged" in message


def test_a_llava_checkpoint_is_not_a_text_encoder(base):
    """P6: the error names the missing step, the extraction of the language model."""
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "text_config": json.loads(path.read_text())}))
    (message,) = verify(CheckpointTree(base), CONFIG)
    assert "'llava'; allowed is 'llama'" in message
    assert "extract-text-encoder" in message


def test_each_part_of_another_model_has_its_own_remedy(base):
    """P6: the remedy for a DiT is an option, for a VAE its config, for CLIP its folder."""
    torch.save({"a": torch.zeros(1)}, base / DIT)
    torch.save({"a": torch.zeros(1)}, base / VAE)
    (base / "text_encoder_2" / "config.json").write_text('{"model_type": "t5"}')
    problems = verify(CheckpointTree(base), CONFIG)
    remedies = ("Set the option `dit`", "Copy the config.json of the same VAE", "Copy openai/clip-vit-large-patch14 to")
    assert [remedy in sentence for remedy, sentence in zip(remedies, problems, strict=True)] == [True] * 3


@pytest.mark.parametrize("form", ["bare", "state_dict", "vae.", "state_dict and vae."])
def test_the_vae_loads_in_every_form_it_is_found_in(base, form):
    """Spec section 7: keys may be bare, under "state_dict", or prefixed "vae." (beside other modules of a training)."""
    bare = stored(base / VAE)
    content = dict(bare)
    if "vae." in form:
        content = {f"vae.{name}": tensor for name, tensor in bare.items()} | {"loss.weight": torch.zeros(1)}
    torch.save({"state_dict": content} if "state_dict" in form else content, base / VAE)
    vae = load_vae(CheckpointTree(base), torch.float16, CPU)
    assert all(torch.equal(tensor, bare[name].half()) for name, tensor in vae.state_dict().items())
    assert vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable JSON"), ("[]", "JSON object"), ("", "not readable JSON")]
)
def test_a_damaged_vae_config_is_reported(base, text, message):
    """P6: a config that is not a JSON object gives a message, not a traceback."""
    (base / "hunyuan-video-t2v-720p/vae/config.json").write_text(text)
    (sentence,) = verify(CheckpointTree(base), CONFIG)
    assert message in sentence
    assert "vae/config.json" in sentence


def test_the_revision_depends_on_the_content_alone(toy, base):
    """P2, P3: a copy in another folder, with other file times and a README, has the same revision."""
    os.utime(base / DIT, (0, 0))
    (base / "text_encoder" / "README.md").write_text("hello")
    (base / "text_encoder" / ".cache").mkdir()
    assert revision(CheckpointTree(base)) == revision(CheckpointTree(toy))
    moved = (base / DIT).rename(base / "another-name.pt")
    assert revision(CheckpointTree(base, dit_weight=moved)) == revision(CheckpointTree(toy))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (DIT, "dit"),
        (VAE, "vae"),
        ("hunyuan-video-t2v-720p/vae/config.json", "vae"),
        ("text_encoder/tokenizer.json", "text_encoder"),
        ("text_encoder_2/model.safetensors", "text_encoder_2"),
    ],
)
def test_the_revision_names_the_part_in_which_one_byte_has_changed(toy, base, name, part):
    """P2: changed weights change the revision of their part, so a resume is refused with the name of the part."""
    content = bytearray((base / name).read_bytes())
    content[len(content) // 2] ^= 1
    (base / name).write_bytes(content)
    before, after = revision(CheckpointTree(toy)), revision(CheckpointTree(base))
    assert list(before) == list(after) == ["dit", "vae", "text_encoder", "text_encoder_2"]
    assert [one for one in before if before[one] != after[one]] == [part]


def test_the_revision_of_a_large_file_covers_its_ends_and_its_size(base):
    """P2: the sampled digest notices another header, another tail and a truncation."""
    file = base / DIT
    os.truncate(file, 40 * 2**20)
    digests_seen = {revision(CheckpointTree(base))["dit"]}
    with file.open("r+b") as large:
        for offset in (0, 40 * 2**20 - 1):
            large.seek(offset)
            large.write(b"\xff")
            large.flush()
            digests_seen.add(revision(CheckpointTree(base))["dit"])
    os.truncate(file, 40 * 2**20 - 1)
    digests_seen.add(revision(CheckpointTree(base))["dit"])
    assert len(digests_seen) == 4


@given(st.integers(0, 2**40))
def test_the_digest_reads_a_bounded_part_of_any_file(size):
    """The digest reads at most 16 MiB of a file, including its first and last bytes, so 26 GB take seconds."""
    blocks = digests._digest_blocks(size)
    assert blocks[0][0] == 0
    assert sum(blocks[-1]) == size
    assert sum(length for _, length in blocks) <= 16 * 2**20
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(blocks))


@pytest.mark.parametrize("itemsize", [1, 2])
def test_no_matrix_of_a_block_lies_between_two_blocks_of_the_digest(itemsize):
    """P3: weights merged into one layer change the revision, for the smallest matrix of the released DiT."""
    width, parameters = 3072, 12_821_012_544
    offsets = [offset for offset, _ in digests._digest_blocks(parameters * itemsize)]
    assert max(b - a for a, b in pairwise(offsets)) < width * width * itemsize


def test_the_revision_of_an_incomplete_tree_is_refused(base):
    """P6: missing weights have no identity."""
    (base / VAE).unlink()
    with pytest.raises(UserError, match="VAE weights missing"):
        revision(CheckpointTree(base))
