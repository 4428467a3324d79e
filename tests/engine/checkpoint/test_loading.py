"""The checkpoint tree: found, refused with a reason, or loaded exactly; and its revision."""

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
    """A complete tree that no test may change."""
    return write_toy_checkpoint(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def base(toy, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(toy, tmp_path / "ckpts")


def load(base, **paths):
    return load_dit(CheckpointTree(base, **paths), CONFIG, "sdpa", torch.float32, CPU)


def stored(path):
    return torch.load(path, weights_only=True)


def test_a_complete_tree_has_nothing_to_say(toy):
    """P6: the checks pass on the layout of the release (spec section 7)."""
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
    """P6: one sentence a file, with where it is expected; and what the whole tree looks like."""
    (base / name).unlink()
    sentence, layout = verify(CheckpointTree(base), CONFIG)
    assert str(base / name) in sentence
    assert "<model_base>/{hunyuan-video-t2v-720p/transformers/mp_rank_00_model_states.pt" in layout


def test_all_missing_files_are_told_at_once(base):
    """P6: nothing is asked for twice, and nothing said twice: one sentence a file, and once the layout."""
    (base / DIT).unlink()
    (base / VAE).unlink()
    shutil.rmtree(base / "text_encoder_2")
    told = CheckpointTree(base).missing()
    assert len(told) == 3
    assert [name in sentence for name, sentence in zip((DIT, VAE, "text_encoder_2"), told, strict=True)] == [True] * 3
    assert verify(CheckpointTree(base), CONFIG) == [*told, tree.LAYOUT]
    assert not any("layout" in sentence for sentence in told)
    (sentence,) = CheckpointTree(base / "nowhere").missing()
    assert f"{base / 'nowhere'} is not a folder" in sentence


def test_the_tensors_of_the_file_become_the_module(toy):
    """Spec section 7: every tensor arrives under its name, in the asked precision, and nothing waits for a gradient."""
    model = load_dit(CheckpointTree(toy), CONFIG, "math", torch.float16, CPU)
    state = stored(toy / DIT)["module"]
    assert model.attention == "math"
    assert model.config == CONFIG
    assert {name: p.dtype for name, p in model.named_parameters()} == dict.fromkeys(state, torch.float16)
    assert all(torch.equal(p, state[name].half()) for name, p in model.named_parameters())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_the_load_key_picks_the_set_of_tensors(base):
    """Spec section 1, `--load-key`: module or ema; another name is refused with the names there are."""
    state = stored(base / DIT)["module"]
    torch.save({"module": state, "ema": {name: tensor + 1 for name, tensor in state.items()}, "step": 3}, base / DIT)
    name = "img_in.proj.bias"
    assert torch.equal(load(base).state_dict()[name], state[name].float())
    assert torch.equal(load(base, load_key="ema").state_dict()[name], (state[name] + 1).float())
    with pytest.raises(UserError, match=r"has no 'EMA' \(the load_key\); its keys are 'module', 'ema', 'step'"):
        load(base, load_key="EMA")


def test_the_dit_may_lie_elsewhere(toy, tmp_path):
    """Spec section 1, `--dit-weight`: a file or a folder; bare, under its key, or as safetensors."""
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
    for place, told in (
        ("both", "several: a_model_states.pt, b_model_states.pt"),
        ("none", "neither"),
        ("gone.pt", "gone.pt is not there"),
    ):
        (sentence,) = CheckpointTree(toy, dit_weight=tmp_path / place).missing()
        assert told in sentence
        with pytest.raises(UserError, match=told):
            load(toy, dit_weight=tmp_path / place)


def test_tensors_that_do_not_fit_are_named(base):
    """P6: a checkpoint of another width or depth is refused by the names that differ, before any GPU is taken."""
    content = stored(base / DIT)
    content["module"]["img_in.proj.bias"] = torch.zeros(7)
    content["module"]["surplus"] = torch.zeros(1)
    del content["module"]["txt_in.input_embedder.weight"]
    torch.save(content, base / DIT)
    (told,) = verify(CheckpointTree(base), CONFIG)
    with pytest.raises(UserError) as refusal:
        load(base)
    assert str(refusal.value) == told
    assert str(base / DIT) in told
    assert "1 missing (txt_in.input_embedder.weight)" in told
    assert "1 not of this model (surplus)" in told
    assert "1 of another shape (img_in.proj.bias is [7], should be [128])" in told


def test_another_depth_names_a_few_tensors_not_hundreds(toy):
    """P6: the released width over a toy file is one readable paragraph."""
    (told,) = verify(CheckpointTree(toy), DiTConfig())
    assert "missing" in told
    assert "of another shape" in told
    assert len(told) < 1500


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
def test_a_damaged_file_is_told_as_such(base, name, read, damage):
    """P6: a half-copied file, or the pointer that a clone without LFS leaves, is a message and not a traceback."""
    damage(base / name)
    with pytest.raises(UserError, match="copy it again") as refusal:
        read(base) if read else load_vae(CheckpointTree(base), torch.float32, CPU)
    assert str(base / name) in str(refusal.value)
    assert verify(CheckpointTree(base), CONFIG) == [str(refusal.value)]


def test_a_damaged_safetensors_file_is_told_as_such(toy, tmp_path):
    """P6, for the other format."""
    file = tmp_path / "dit.safetensors"
    save_file(stored(toy / DIT)["module"], file)
    _truncate(file)
    with pytest.raises(UserError, match="copy it again"):
        load(toy, dit_weight=file)


class Payload:
    """Unpickled by the ordinary unpickler, it would create `target`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("name", [DIT, VAE])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_a_checkpoint_cannot_run_code(base, tmp_path, name, zipped):
    """Weights come from strangers: unpickling yields tensors, or an error that names what would have run."""
    content = {"module": Payload(tmp_path / "owned")}
    torch.save(content, base / name, _use_new_zipfile_serialization=zipped)
    (told,) = verify(CheckpointTree(base), CONFIG)
    assert f"{base / name} holds more than tensors: to read it, io.open would have to run" in told
    assert "safetensors" in told
    assert not (tmp_path / "owned").exists()


def test_a_training_state_with_objects_in_it_is_refused_by_their_name(base):
    """What needs more than tensors is not read in part: an optimiser's or argparse's leftovers are named."""
    content = stored(base / DIT)
    torch.save(content | {"args": argparse.Namespace(lr=1e-4)}, base / DIT)
    with pytest.raises(UserError, match=r"argparse\.Namespace would have to run"):
        load(base)


def test_safetensors_in_shards_load_as_one_file_does(toy, tmp_path):
    """A folder with an index and its shards may be the DiT; a missing or truncated shard is told."""
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
    assert "model-2.safetensors is not there" in CheckpointTree(toy, dit_weight=tmp_path).missing()[0]
    with pytest.raises(
        UserError, match=r"model-2\.safetensors is not there, but model\.safetensors\.index\.json names"
    ):
        load(toy, dit_weight=tmp_path)


def test_cpu_weights_lie_where_torch_would_have_put_them(toy, tmp_path):
    """P3: matrix kernels of the CPU sum in another order over weights that begin at an odd address of a file."""
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
    ("content", "told"),
    [
        (b"", "(0 bytes) is damaged or not a checkpoint: it is empty. Compare"),
        (b"<html>Not found</html>", "(22 bytes) is damaged or not a checkpoint: Unsupported operand 60. Compare"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n",
            "is a pointer of Git LFS, not the file itself",
        ),
    ],
)
@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
def test_what_a_failed_download_leaves_is_recognised(toy, tmp_path, name, content, told):
    """P6: nothing, a page of a web server, the pointer of a clone without LFS; in whole sentences."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refusal:
        load(toy, dit_weight=tmp_path / name)
    assert str(tmp_path / name) in str(refusal.value)
    assert told in str(refusal.value) or (name == "dit.safetensors" and b"html" in content)


@pytest.mark.parametrize("tower", ["text_encoder", "text_encoder_2"])
def test_a_truncated_text_tower_is_told_before_it_is_loaded(base, tower):
    """P6: its header is read with the others'."""
    _truncate(base / tower / "model.safetensors")
    (told,) = verify(CheckpointTree(base), CONFIG)
    assert str(base / tower / "model.safetensors") in told
    assert "damaged" in told


def test_a_whole_llava_is_no_text_encoder(base):
    """P6: the step that was forgotten is named."""
    path = base / "text_encoder" / "config.json"
    path.write_text(json.dumps({"model_type": "llava", "text_config": json.loads(path.read_text())}))
    (told,) = verify(CheckpointTree(base), CONFIG)
    assert "'llava'; allowed is 'llama'" in told
    assert "extract-text-encoder" in told


def test_each_part_of_another_model_has_its_own_remedy(base):
    """P6: what helps with a DiT is an option, with a VAE its config, with CLIP its folder."""
    torch.save({"a": torch.zeros(1)}, base / DIT)
    torch.save({"a": torch.zeros(1)}, base / VAE)
    (base / "text_encoder_2" / "config.json").write_text('{"model_type": "t5"}')
    told = verify(CheckpointTree(base), CONFIG)
    remedies = ("Set the option `dit`", "Copy the config.json beside it", "Copy openai/clip-vit-large-patch14 there")
    assert [remedy in sentence for remedy, sentence in zip(remedies, told, strict=True)] == [True] * 3


@pytest.mark.parametrize("form", ["bare", "state_dict", "vae.", "state_dict and vae."])
def test_the_vae_loads_in_every_form_it_is_found_in(base, form):
    """Spec section 7: keys bare, under "state_dict", or prefixed "vae." (then beside other modules of a training)."""
    bare = stored(base / VAE)
    content = dict(bare)
    if "vae." in form:
        content = {f"vae.{name}": tensor for name, tensor in bare.items()} | {"loss.weight": torch.zeros(1)}
    torch.save({"state_dict": content} if "state_dict" in form else content, base / VAE)
    vae = load_vae(CheckpointTree(base), torch.float16, CPU)
    assert all(torch.equal(tensor, bare[name].half()) for name, tensor in vae.state_dict().items())
    assert vae.dtype == torch.float16


@pytest.mark.parametrize(
    ("text", "told"), [("{", "not readable JSON"), ("[]", "JSON object"), ("", "not readable JSON")]
)
def test_a_broken_vae_config_is_told(base, text, told):
    """P6: as for the weights."""
    (base / "hunyuan-video-t2v-720p/vae/config.json").write_text(text)
    (sentence,) = verify(CheckpointTree(base), CONFIG)
    assert told in sentence
    assert "vae/config.json" in sentence


def test_the_revision_depends_on_the_content_alone(toy, base):
    """P2, P3: a copy elsewhere, with other times and a README, is the same model."""
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
    """P2: changed weights are not resumed into, and the refusal says which ones have changed."""
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
    seen = {revision(CheckpointTree(base))["dit"]}
    with file.open("r+b") as large:
        for offset in (0, 40 * 2**20 - 1):
            large.seek(offset)
            large.write(b"\xff")
            large.flush()
            seen.add(revision(CheckpointTree(base))["dit"])
    os.truncate(file, 40 * 2**20 - 1)
    seen.add(revision(CheckpointTree(base))["dit"])
    assert len(seen) == 4


@given(st.integers(0, 2**40))
def test_the_digest_reads_a_bounded_part_of_any_file(size):
    """The digest of a 26 GB file takes seconds: 16 MiB at most, from the first byte to the last."""
    blocks = digests._digest_blocks(size)
    assert blocks[0][0] == 0
    assert sum(blocks[-1]) == size
    assert sum(length for _, length in blocks) <= 16 * 2**20
    assert all(a[0] + a[1] <= b[0] for a, b in pairwise(blocks))


@pytest.mark.parametrize("itemsize", [1, 2])
def test_no_matrix_of_a_block_lies_between_two_blocks_of_the_digest(itemsize):
    """P3: weights merged into one layer are another revision; the smallest matrix of the released DiT, bf16 or FP8."""
    width, parameters = 3072, 12_821_012_544  # spec section 2
    offsets = [offset for offset, _ in digests._digest_blocks(parameters * itemsize)]
    assert max(b - a for a, b in pairwise(offsets)) < width * width * itemsize


def test_the_revision_of_an_incomplete_tree_is_refused(base):
    """P6: no identity is invented for weights that are not there."""
    (base / VAE).unlink()
    with pytest.raises(UserError, match="VAE weights missing"):
        revision(CheckpointTree(base))
