"""SAT folders: which files are read, how ranks are laid together, and what is said of folders that are not whole."""

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lavish.checkpoints import layouts, sat
from lavish.checkpoints.tensor_map import Assembled, TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, UnknownLayout, UnsafeCheckpoint

OPEN = Path(__file__).resolve().parents[1] / "fixtures/cogvlm_sat/open"
SINGLE, DOUBLE = OPEN / "checkpoint", OPEN / "checkpoint_mp2"
RANK0, RANK1 = "mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"
QKV = "transformer.layers.0.attention.query_key_value.weight"
NORM = "transformer.layers.0.input_layernorm.weight"


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SINGLE, tmp_path / "single"))


@pytest.fixture
def double(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DOUBLE, tmp_path / "double"))


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], None], **beside: Any) -> None:
    """Save a rank's file again with its weights changed, and more entries beside them."""
    module = torch.load(file, weights_only=True)["module"]
    change(module)
    torch.save({"module": module, **beside}, file)


def nothing(module: dict[str, torch.Tensor]) -> None:
    """Change nothing."""


def equal(one: TensorMap, other: TensorMap) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def set_config(root: Path, **changes: Any) -> None:
    fields = json.loads((root / sat.CONFIG).read_text())
    (root / sat.CONFIG).write_text(json.dumps({**fields, **changes}))


# -- which file --------------------------------------------------------------------------------------------------------


def test_two_ranks_are_the_single_file_bit_for_bit() -> None:
    whole, ranks = sat.read(SINGLE), sat.open_checkpoint(DOUBLE)
    assert ranks.num_ranks == 2
    assert equal(ranks.tensors, whole)
    raw = torch.load(SINGLE / "1" / RANK0, weights_only=True)["module"]
    assert list(raw) == list(whole)
    assert all(torch.equal(whole[name], raw[name]) for name in raw)
    assert isinstance(ranks.tensors.info(QKV), Assembled)
    assert len(ranks.tensors.files) == 2


@pytest.mark.parametrize("part", ["", "1", f"1/{RANK0}", f"1/{RANK1}", "model_config.json"])
def test_root_iteration_and_file_are_the_same_checkpoint(part: str) -> None:
    assert layouts.detect(DOUBLE / part) == "sat" if part != "model_config.json" else True
    assert equal(sat.read(DOUBLE / part), sat.read(SINGLE))


def test_latest_names_an_iteration_or_the_release(single: Path) -> None:
    (single / "1").rename(single / "release")
    (single / "latest").write_text("release\n")
    assert equal(sat.read(single), sat.read(SINGLE))
    shutil.copytree(single / "release", single / "800")
    rewrite(single / "800" / RANK0, lambda module: module[NORM].zero_(), iteration=800)
    (single / "latest").write_text("800")
    opened = sat.open_checkpoint(single)
    assert opened.iteration == 800
    assert opened.tensors[NORM].eq(0).all()
    assert sat.open_checkpoint(single / "release").iteration is None


def test_ema_is_read_where_it_is_named_or_alone(single: Path) -> None:
    shutil.copytree(single / "1", single / "1-ema")
    rewrite(single / "1-ema" / RANK0, lambda module: module[NORM].zero_())
    assert sat.read(single)[NORM].ne(0).any()
    assert sat.read(single / "1-ema")[NORM].eq(0).all()
    shutil.rmtree(single / "1")
    assert sat.read(single)[NORM].eq(0).all()


def test_without_latest_the_only_iteration_is_taken(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    (single / "latest").unlink()
    caplog.set_level("INFO")
    assert equal(sat.read(single), sat.read(SINGLE))
    assert "taken: 1, the only iteration" in caplog.text
    shutil.copytree(single / "1", single / "2")
    with pytest.raises(UnknownLayout, match=r"has no file 'latest' and holds 2 iterations \(1, 2\). Name one: "):
        sat.read(single)
    shutil.rmtree(single / "1")
    shutil.rmtree(single / "2")
    with pytest.raises(UnknownLayout, match=r"holds no iteration's folder"):
        sat.read(single)


@pytest.mark.parametrize("text", ["", "newest", "1.5", "-1", "../1", "١", "9" * 5000, "\0"])
def test_latest_that_says_nothing(single: Path, text: str) -> None:
    (single / "latest").write_text(text)
    with pytest.raises(CheckpointError, match=r"latest: says .* it holds an iteration's number or the word 'release'"):
        sat.read(single)


def test_latest_that_names_another_folder(single: Path) -> None:
    (single / "latest").write_text("00500")
    with pytest.raises(MissingKeys, match=r"says iteration '500'.* no such folder .* there are 1, name one: .*/1"):
        sat.read(single)


def test_a_folder_without_its_config(single: Path) -> None:
    (single / sat.CONFIG).unlink()
    with pytest.raises(UnknownLayout, match=r"no SAT checkpoint; looked for model_config.json"):
        sat.read(single)


def test_headers_are_read_without_torch() -> None:
    program = (
        "import sys; from lavish.checkpoints import sat; from lavish.models import family; "
        f"opened = family('cogvlm').open_release(__import__('pathlib').Path({str(DOUBLE)!r}), {{}}); "
        "assert len(opened.tensors) == 65; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_links_that_leave_the_folder(single: Path, tmp_path: Path) -> None:
    (single / "1" / RANK0).rename(tmp_path / "elsewhere.pt")
    (single / "1" / RANK0).symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UnsafeCheckpoint, match=r"is a link to .* outside of the folder"):
        sat.read(single)


# -- what a training run writes beside the weights ---------------------------------------------------------------------


def training_entries(iteration: int = 800) -> dict[str, Any]:
    """What SAT and DeepSpeed save beside the weights: random states with NumPy's objects, schedules, shapes, sets."""
    generator = np.random.RandomState(5)
    return {
        "iteration": iteration,
        "client_lr_scheduler": {"start_lr": 1e-5, "num_iters": np.float64(3.5), "decay_style": "cosine"},
        "random_rng_state": random.Random(3).getstate(),
        "np_rng_state": generator.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.zeros(16, dtype=torch.uint8),
        "args": argparse.Namespace(save="checkpoints", lr=1e-5, seed=np.int64(2023), nested=argparse.Namespace(a=1)),
        "optimizer": None,
        "param_shapes": [OrderedDict(a=torch.Size([3, 4]))],
        "sparse_tensor_module_names": {"a"},
        "skipped_steps": 0,
        "ds_config": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    }


def test_a_training_run_s_file_opens(single: Path) -> None:
    file = single / "1" / RANK0
    module = torch.load(file, weights_only=True)["module"]
    torch.save({"module": OrderedDict(module), **training_entries()}, file)
    (single / "1/zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"never opened")
    opened = sat.open_checkpoint(single)
    assert opened.iteration == 800
    assert equal(opened.tensors, sat.read(SINGLE))


class Runs:
    def __reduce__(self) -> Any:
        return print, ("something ran",)


@pytest.mark.parametrize("where", ["beside", "module"])
def test_what_would_run_is_refused_by_name(single: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = single / "1" / RANK0
    module = torch.load(file, weights_only=True)["module"]
    torch.save({"module": {**module, "x": Runs()}} if where == "module" else {"module": module, "args": Runs()}, file)
    with pytest.raises(UnsafeCheckpoint, match=r"asks for '(__builtin__|builtins).print'"):
        sat.read(single)
    assert "something ran" not in capsys.readouterr().out


def test_a_weight_that_is_an_object(single: Path) -> None:
    rewrite(single / "1" / RANK0, lambda module: module.update(x=argparse.Namespace(a=1)))  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"holds a Inert as 'x' of 'module', where SAT has tensors only"):
        sat.read(single)


@pytest.mark.parametrize("content", [{"model": {"a": torch.ones(2)}}, {"module": {}}, {"module": 3}, [1, 2]])
def test_files_without_weights(single: Path, content: Any) -> None:
    torch.save(content, single / "1" / RANK0)
    with pytest.raises(CheckpointError, match=r"and no weights under 'module', where SAT keeps them"):
        sat.read(single)


@pytest.mark.parametrize("kept", [0.0, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file(double: Path, kept: float) -> None:
    file = double / "1" / RANK1
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=rf"{RANK1}: .*cut off"):
        sat.read(double)


# -- ranks -------------------------------------------------------------------------------------------------------------


def test_a_missing_rank(double: Path) -> None:
    (double / "1" / RANK1).unlink()
    with pytest.raises(MissingKeys, match=rf"1 of 2 ranks are absent, first {RANK1}. Fetch {RANK1}"):
        sat.read(double)
    (double / "1" / RANK0).rename(double / "1" / RANK1)
    with pytest.raises(MissingKeys, match=rf"1 of 2 ranks are absent, first {RANK0}"):
        sat.read(double / "1")


def test_a_rank_in_another_iteration_s_folder(double: Path) -> None:
    (double / "2").mkdir()
    (double / "1" / RANK1).rename(double / "2" / RANK1)
    with pytest.raises(MissingKeys, match=r"'2' holds one, of another iteration: ranks of two do not mix"):
        sat.read(double)


def test_ranks_of_different_iterations(double: Path) -> None:
    rewrite(double / "1" / RANK0, nothing, iteration=400)
    rewrite(double / "1" / RANK1, nothing, iteration=800)
    with pytest.raises(CheckpointError, match=r"ranks are of different iterations \(400, 800\)"):
        sat.read(double)


def test_more_ranks_than_the_config_says(double: Path) -> None:
    set_config(double, model_parallel_size=1)
    with pytest.raises(CheckpointError, match=r"holds 2 ranks, and .*model_config.json says model_parallel_size 1"):
        sat.read(double)


@pytest.mark.parametrize("size", [0, -2, "2", True, 1000, None])
def test_a_size_that_is_none(double: Path, size: Any) -> None:
    set_config(double, model_parallel_size=size)
    with pytest.raises(CheckpointError, match=r"model_parallel_size is .*; it is a number from 1 to"):
        sat.read(double)


def test_one_share_called_the_whole(double: Path) -> None:
    (double / "1" / RANK1).unlink()
    set_config(double, model_parallel_size=1)
    with pytest.raises(CheckpointError, match=r"one of 2 shares, and model_config.json says model_parallel_size 1"):
        sat.read(double)


def test_a_merged_checkpoint_saved_once_a_rank(double: Path) -> None:
    for rank in (RANK0, RANK1):
        shutil.copyfile(SINGLE / "1" / RANK0, double / "1" / rank)
    with pytest.raises(CheckpointError, match=r"on each of 2 ranks, which is the whole tensor .* saved 2 times"):
        sat.read(double)


def test_unequal_replicated_tensors(double: Path) -> None:
    rewrite(double / "1" / RANK1, lambda module: module[NORM].add_(1e-3))
    with pytest.raises(CheckpointError, match=rf"'{NORM}' of rank 1 differs from rank 0's"):
        sat.read(double)


def test_replicated_tensors_without_checksums(double: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the zip files do not say it, the bytes themselves are compared."""
    monkeypatch.setattr(sat._Checksums, "of", lambda self, info: 0)
    assert equal(sat.read(double), sat.read(SINGLE))
    rewrite(double / "1" / RANK1, lambda module: module[NORM].add_(1e-3))
    with pytest.raises(CheckpointError, match=r"of rank 1 differs from rank 0's"):
        sat.read(double)


def test_biases_of_row_parallel_layers_are_whole_on_every_rank(double: Path) -> None:
    name = "mixins.eva.vit_model.transformer.layers.0.attention.dense.bias"
    assert torch.equal(sat.read(double)[name], sat.read(SINGLE)[name])
    rewrite(double / "1" / RANK1, lambda module: module[name].mul_(2))
    with pytest.raises(CheckpointError, match=rf"'{name}' of rank 1 differs"):
        sat.read(double)


def test_ranks_with_different_names(double: Path) -> None:
    rewrite(double / "1" / RANK1, lambda module: module.pop(NORM))
    with pytest.raises(MissingKeys, match=rf"rank 1 has no '{NORM}', which rank 0 has"):
        sat.read(double)


def test_shapes_that_are_no_share(double: Path) -> None:
    set_config(double, hidden_size=96)
    with pytest.raises(ShapeMismatch, match=r"it is 288 along dimension 0, so each has 144"):
        sat.read(double)
    set_config(double, hidden_size=None)
    with pytest.raises(CheckpointError, match=r"hidden_size is None; it is a whole number above 0"):
        sat.read(double)


def test_ranks_with_shares_of_different_sizes(double: Path) -> None:
    rewrite(double / "1" / RANK1, lambda module: module.update({QKV: module[QKV][:-3]}))
    with pytest.raises(ShapeMismatch, match=r"has the shapes .* on the 2 ranks; they are equal in SAT"):
        sat.read(double)


# -- cuts --------------------------------------------------------------------------------------------------------------


def write_ranks(root: Path, tensors: TensorMap, num_ranks: int) -> Path:
    """Write the shares of a checkpoint as SAT would."""
    for rank in range(num_ranks):
        module = {}
        for name, info in tensors.infos.items():
            cut = sat.cut_of(name)
            is_cut = cut is not None and not (name in sat.VOCABULARY and info.shape[0] < sat.LEAST_CUT_VOCABULARY)
            part = sat.share(info, cut, rank, num_ranks) if cut is not None and is_cut else info
            module[name] = tensors.assemble(part)
        folder = root / "1"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"module": module}, folder / sat.RANK_FILE.format(rank))
    (root / "latest").write_text("1")
    return root


def small_checkpoint(root: Path, vocab_size: int) -> Path:
    """One layer of each transformer with widths that divide by 8; every element differs."""
    fields = {"hidden_size": 16, "inner_hidden_size": 24, "vocab_size": vocab_size, "num_attention_heads": 8}
    eva = {"hidden_size": 32, "inner_hidden_size": 40, "num_attention_heads": 8}
    shapes = {
        "transformer.word_embeddings.weight": (vocab_size, 16),
        "mixins.lm.lm_head.weight": (vocab_size, 16),
        QKV: (48, 16),
        "transformer.layers.0.attention.dense.weight": (16, 16),
        "mixins.rotary.vision_query_key_value_list.0.weight": (48, 16),
        "mixins.rotary.vision_dense_list.0.weight": (16, 16),
        "mixins.mlp.gate_proj.0.weight": (24, 16),
        "mixins.mlp.vision_gate_proj.0.weight": (24, 16),
        "mixins.mlp.vision_dense_h_to_4h_list.0.weight": (24, 16),
        "mixins.mlp.vision_dense_4h_to_h_list.0.weight": (16, 24),
        "transformer.layers.0.mlp.dense_h_to_4h.weight": (24, 16),
        "transformer.layers.0.mlp.dense_4h_to_h.weight": (16, 24),
        "mixins.eva.linear_proj.gate_proj.weight": (24, 16),
        "mixins.eva.linear_proj.dense_h_to_4h.weight": (24, 16),
        "mixins.eva.linear_proj.dense_4h_to_h.weight": (16, 24),
        "mixins.eva.vit_model.transformer.word_embeddings.weight": (1, 32),
        "mixins.eva.vit_model.transformer.layers.0.attention.query_key_value.weight": (96, 32),
        "mixins.eva.vit_model.transformer.layers.0.attention.query_key_value.bias": (96,),
        "mixins.eva.vit_model.transformer.layers.0.attention.dense.weight": (32, 32),
        "mixins.eva.vit_model.transformer.layers.0.attention.dense.bias": (32,),
        "mixins.eva.vit_model.transformer.layers.0.mlp.dense_h_to_4h.weight": (40, 32),
        "mixins.eva.vit_model.transformer.layers.0.mlp.dense_h_to_4h.bias": (40,),
        "mixins.eva.vit_model.transformer.layers.0.mlp.dense_4h_to_h.weight": (32, 40),
        "mixins.eva.vit_model.transformer.layers.0.mlp.dense_4h_to_h.bias": (32,),
        NORM: (16,),
        "mixins.rotary.rotary_emb.inv_freq": (1,),
    }
    (root / "1").mkdir(parents=True)
    (root / "latest").write_text("1")
    (root / sat.CONFIG).write_text(json.dumps({**fields, "eva_args": eva, "model_parallel_size": 1}))
    module = {name: torch.rand(shape).bfloat16() for name, shape in shapes.items()}
    torch.save({"module": module}, root / "1" / RANK0)
    return root


@pytest.mark.parametrize("vocab_size", [1024, 96])
def test_any_size_to_any_size(tmp_path: Path, vocab_size: int) -> None:
    """1 -> 2 -> 4 -> 8 -> 1, each out of the shares of the one before: cut and laid together bit for bit. A vocabulary
    below 1000 is whole on every rank."""
    root = small_checkpoint(tmp_path / "1", vocab_size)
    whole = held = sat.read(root)
    for num_ranks in (2, 4, 8):
        folder = tmp_path / str(num_ranks)
        folder.mkdir()
        shutil.copyfile(root / sat.CONFIG, folder / sat.CONFIG)
        set_config(folder, model_parallel_size=num_ranks)
        held = sat.read(write_ranks(folder, held, num_ranks))
        assert equal(held, whole)
        table = held.info("transformer.word_embeddings.weight")
        assert isinstance(table, Assembled) == (vocab_size >= 1000)


def test_our_cuts_are_sat_s_own() -> None:
    """The shares that lavish makes of the single file are the files that SAT wrote."""
    whole = sat.read(SINGLE)
    for rank, name in enumerate((RANK0, RANK1)):
        stored = torch.load(DOUBLE / "1" / name, weights_only=True)["module"]
        for key, value in stored.items():
            cut = sat.cut_of(key)
            ours = whole.assemble(whole.info(key) if cut is None else sat.share(whole.info(key), cut, rank, 2))
            assert torch.equal(ours, value), key


def test_what_does_not_divide() -> None:
    whole = sat.read(SINGLE)
    cut = sat.cut_of(QKV)
    assert cut is not None
    with pytest.raises(ShapeMismatch, match=r"does not divide among 5 ranks along dimension 0 in 3 blocks"):
        sat.share(whole.info(QKV), cut, 0, 5)
