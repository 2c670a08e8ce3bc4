"""ZeRO checkpoints that deepspeed wrote (tests/fixtures/deepspeed/make.py), whole and with something wrong."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from zero_files import Trees, write_zero

from lavish.checkpoints import deepspeed
from lavish.checkpoints.tensor_map import Assembled
from lavish.common.errors import CheckpointError, MissingKeys, UnknownLayout, UnsafeCheckpoint

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "deepspeed"
STAGES = {"zero1": 1, "zero2": 2, "zero2_robin": 2, "zero3": 3, "zero3_fp32": 3, "zero3_groups": 3}
CASES = tuple(STAGES)
FROZEN = ("tower.weight", "tower.bias")
MODEL = "mp_rank_00_model_states.pt"


@pytest.fixture(autouse=True)
def _no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading must do without deepspeed, also where it is installed."""
    monkeypatch.setitem(sys.modules, "deepspeed", None)


def expected(case: str, folder: Path = FIXTURES) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{case}.safetensors")


@pytest.fixture
def copied(tmp_path: Path):
    """A copy of a case to damage."""

    def copy(case: str) -> Path:
        return Path(shutil.copytree(FIXTURES / case, tmp_path / case)) / "global_step2"

    return copy


def assert_equal(tensors: Any, wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        assert torch.equal(tensors[name].to(value.dtype), value), name


# -- what deepspeed makes of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_equals_what_deepspeed_makes_of_it(case: str) -> None:
    tensors = deepspeed.read(FIXTURES / case)
    wanted = expected(case)
    assert_equal(tensors, wanted)
    # deepspeed itself loses what is frozen under ZeRO 1: there it is in the network's own file alone.
    assert set(tensors) - set(wanted) == (set(FROZEN) if case == "zero1" else set())
    assert torch.equal(tensors["head.weight"], tensors["embed.weight"])
    assert tensors["position_ids"].dtype == torch.int64


@pytest.mark.parametrize("case", CASES)
def test_trained_is_float32_and_the_rest_as_stored(case: str) -> None:
    tensors = deepspeed.read(FIXTURES / case)
    frozen = torch.float32 if case in ("zero1", "zero3_fp32") else torch.bfloat16
    for name in tensors:
        if name not in ("position_ids", *FROZEN):
            assert tensors[name].dtype == torch.float32, name
    assert {tensors[name].dtype for name in FROZEN} == {frozen}


@pytest.mark.parametrize("case", CASES)
def test_survey(case: str) -> None:
    run = deepspeed.survey(FIXTURES / case)
    assert (run.stage, run.num_processes, run.step, run.absent) == (STAGES[case], 2, 2, ())
    assert run.version is not None
    assert run.folder.name == "global_step2"


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_copied_before_a_tensor_is_taken(case: str) -> None:
    """Parameters that lie in several files are pieces of these; names and shapes come from the pickles alone."""
    infos = deepspeed.read(FIXTURES / case).infos
    cut = [name for name, info in infos.items() if isinstance(info, Assembled)]
    assert cut
    for info in (infos[name] for name in cut):
        assert isinstance(info, Assembled)
        assert info.is_flat
        assert len({piece.info.file for piece in info.pieces}) == 2


def test_paths_that_mean_the_same() -> None:
    step = FIXTURES / "zero3" / "global_step2"
    assert_equal(deepspeed.read(step), expected("zero3"))


def test_without_latest_the_only_step_counts(copied) -> None:
    step = copied("zero2")
    (step.parent / "latest").unlink()
    assert_equal(deepspeed.read(step.parent), expected("zero2"))
    shutil.copytree(step, step.parent / "global_step1")
    with pytest.raises(UnknownLayout, match="2 steps and no 'latest'"):
        deepspeed.read(step.parent)


@pytest.mark.parametrize("keep_shares", [True, False])
def test_the_network_s_own_file_is_whole_below_zero_3(copied, keep_shares: bool) -> None:
    """People delete the optimizer's files: what is left is the network in the run's precision."""
    step = copied("zero2")
    if not keep_shares:
        for file in step.glob("*_optim_states.pt"):
            file.unlink()
    tensors = deepspeed.read(step / MODEL if keep_shares else step)
    assert tensors["up.weight"].dtype == torch.bfloat16
    for name, value in expected("zero2").items():
        assert torch.equal(tensors[name], value.to(tensors[name].dtype)), name


def test_a_link_out_of_the_folder(copied, tmp_path: Path) -> None:
    step = copied("zero2")
    (tmp_path / MODEL).write_bytes((step / MODEL).read_bytes())
    (step / MODEL).unlink()
    (step / MODEL).symlink_to(tmp_path / MODEL)
    with pytest.raises(UnsafeCheckpoint, match="outside of the folder"):
        deepspeed.read(step)


# -- what is wrong with a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_an_absent_share(copied, case: str) -> None:
    step = copied(case)
    gone = next(step.glob("*rank_1_mp_rank_00_optim_states.pt"))
    gone.unlink()
    with pytest.raises(MissingKeys, match=gone.name) as caught:
        deepspeed.read(step)
    assert ("give that file" in str(caught.value)) == (STAGES[case] < 3)
    assert deepspeed.survey(step).absent == (gone.name,)


def test_an_absent_model_file_of_zero_3(copied) -> None:
    step = copied("zero3")
    (step / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(MissingKeys, match="zero_pp_rank_1_mp_rank_00_model_states"):
        deepspeed.read(step)
    (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(MissingKeys, match="which names the tensors"):
        deepspeed.read(step)


def test_zero_3_without_its_optimizer(copied) -> None:
    step = copied("zero3")
    for file in step.glob("*_optim_states.pt"):
        file.unlink()
    with pytest.raises(MissingKeys, match="they hold the weights"):
        deepspeed.read(step)
    with pytest.raises(UnknownLayout, match="give the step's folder"):
        deepspeed.read(step / "zero_pp_rank_0_mp_rank_00_model_states.pt")


@pytest.mark.parametrize(
    ("tag", "error", "words"),
    [
        ("global_step9", UnknownLayout, "there are: global_step2"),
        ("../zero2", UnsafeCheckpoint, "no folder beside it"),
        ("..", UnsafeCheckpoint, "no folder beside it"),
        ("", UnsafeCheckpoint, "no folder beside it"),
        ("x" * 100_000, UnknownLayout, "no step's folder"),
    ],
)
def test_a_wrong_latest(copied, tag: str, error: type[Exception], words: str) -> None:
    step = copied("zero2")
    (step.parent / "latest").write_text(tag)
    with pytest.raises(error, match=words):
        deepspeed.read(step.parent)


def toy() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (7, 5), "tower.weight": (3, 5), "up.weight": (9, 5), "up.bias": (9,), "scale": ()}
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**drawn, "inv_freq": torch.arange(3.0), "head.weight": drawn["embed.weight"]}


def written(folder: Path, stage: int, change: Any = None, **options: Any) -> Path:
    how = {"frozen": ("tower.weight",), "buffers": ("inv_freq",), "shared": {"head.weight": "embed.weight"}}
    return write_zero(folder / "run", toy(), stage=stage, change=change, **{**how, **options})


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_any_number_of_processes(tmp_path: Path, stage: int, num_processes: int) -> None:
    """Eight processes for a scalar and a bias of nine: most slices are padding."""
    tensors = deepspeed.read(written(tmp_path, stage, num_processes=num_processes))
    for name, value in toy().items():
        is_whole = name == "inv_freq" or (stage and name != "tower.weight")
        assert torch.equal(tensors[name], value if is_whole else value.to(torch.bfloat16)), name


@pytest.mark.parametrize("case", ["zero1", "zero2", "zero3", "zero3_fp32"])
def test_our_files_say_what_deepspeed_s_say(tmp_path: Path, case: str) -> None:
    """The helper of other tests lays tensors out as deepspeed does: same files, keys and shapes."""
    tensors, stage = deepspeed.read(FIXTURES / case), STAGES[case]
    order = [name for group in deepspeed.survey(FIXTURES / case).models[0]["param_shapes"] for name in group]
    rest = [name for name in tensors if name not in order]
    dtype = torch.float32 if tensors["tower.weight"].dtype == torch.float32 else torch.bfloat16
    ours = write_zero(
        tmp_path / "run",
        {name: tensors[name] for name in (*order, *rest)},
        stage=stage,
        frozen=FROZEN,
        buffers=("inv_freq", "position_ids"),
        shared={"head.weight": "embed.weight"},
        dtype=dtype,
    )
    theirs, made = deepspeed.survey(FIXTURES / case), deepspeed.survey(ours)
    assert [file.name for file in made.files] == [file.name for file in theirs.files]
    key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    for mine, its in zip(made.shares, theirs.shares, strict=True):
        assert [part.shape for part in mine[key]] == [part.shape for part in its[key]]
    for mine, its in zip(made.models, theirs.models, strict=True):
        assert set(mine) <= set(its)
        for name in ("param_shapes", "frozen_param_shapes", "shared_params", "buffer_names"):
            assert mine[name] == its[name], name


# -- files of different runs -------------------------------------------------------------------------------------------


def named(trees: Trees, ending: str) -> dict[str, Any]:
    return next(tree for name, tree in trees.items() if name.endswith(ending))


def share(trees: Trees, rank: int) -> dict[str, Any]:
    return named(trees, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")["optimizer_state_dict"]


def later_step(trees: Trees) -> None:
    named(trees, "zero_pp_rank_1_mp_rank_00_model_states.pt")["global_steps"] = 3


def other_version(trees: Trees) -> None:
    named(trees, "rank_1_mp_rank_00_optim_states.pt")["ds_version"] = "0.9.1"


def other_world(trees: Trees) -> None:
    share(trees, 1)["partition_count"] = 4


def other_stage(trees: Trees) -> None:
    share(trees, 1)["zero_stage"] = 2


def odd_stage(trees: Trees) -> None:
    share(trees, 0)["zero_stage"] = 7


def third_process(trees: Trees) -> None:
    trees["bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"] = named(trees, "rank_1_mp_rank_00_optim_states.pt")


def second_rank(trees: Trees) -> None:
    trees["mp_rank_01_model_states.pt"] = named(trees, "model_states.pt")


def twice(trees: Trees) -> None:
    trees["zero_pp_rank_0_mp_rank_00_optim_states.pt"] = named(trees, "rank_0_mp_rank_00_optim_states.pt")


def other_sizes(trees: Trees) -> None:
    named(trees, "zero_pp_rank_1_mp_rank_00_model_states.pt")["param_shapes"][0]["up.weight"] = torch.Size([9, 4])


def longer(trees: Trees) -> None:
    for tree in trees.values():
        if "param_shapes" in tree:
            tree["param_shapes"][0]["up.weight"] = torch.Size([90, 5])


def shorter_share(trees: Trees) -> None:
    share(trees, 1)["fp32_flat_groups"][0] = torch.zeros(3)


def no_group(trees: Trees) -> None:
    share(trees, 1)["fp32_flat_groups"].pop()


def not_flat(trees: Trees) -> None:
    share(trees, 1)["fp32_flat_groups"][0] = torch.zeros(3, 3)


def half_share(trees: Trees) -> None:
    share(trees, 1)["fp32_flat_groups"][0] = share(trees, 1)["fp32_flat_groups"][0].half()


def no_tensor(trees: Trees) -> None:
    share(trees, 1)["fp32_flat_groups"] = "none"


def odd_shape(trees: Trees) -> None:
    for tree in trees.values():
        if "param_shapes" in tree:
            tree["param_shapes"][0]["up.weight"] = (-1, 5)


def no_slice(trees: Trees) -> None:
    named(trees, "zero_pp_rank_1_mp_rank_00_model_states.pt")["frozen_param_fragments"] = {}


def unnamed(trees: Trees) -> None:
    for tree in trees.values():
        if "module" in tree:
            tree["module"]["lost.weight"] = torch.ones(3)


def no_module(trees: Trees) -> None:
    named(trees, "model_states.pt")["module"] = None


def objects(trees: Trees) -> None:
    named(trees, "model_states.pt")["module"]["up.weight"] = "text"


def uncounted(trees: Trees) -> None:
    for rank in range(2):
        share(trees, rank)["partition_count"] = None


@pytest.mark.parametrize(
    ("stage", "change", "words"),
    [
        (3, later_step, r"global_steps 2 and zero_pp_rank_1\S* 3; they are of different runs or steps"),
        (2, other_version, "ds_version '0.19.8' and .* '0.9.1'; they are of different"),
        (3, other_world, "shards of runs of 2 and 4 processes"),
        (3, other_stage, "shards of ZeRO 2 and 3 lie together"),
        (2, odd_stage, "names the ZeRO stage 7"),
        (2, third_process, "a shard of process 2, and the others are of a run of 2"),
        (2, second_rank, "2 ranks of tensor parallelism"),
        (2, twice, "are both of process 0"),
        (3, other_sizes, "differ in param_shapes"),
        (2, longer, r"group 0 of the parameters|is \(90, 5\) and the shards hold"),
        (3, longer, r"is \(90, 5\) and the shards hold"),
        (3, shorter_share, "not of one run"),
        (3, no_group, "different numbers of groups"),
        (3, not_flat, r"has the shape \(3, 3\), not flat"),
        (3, half_share, "a part of a float32 tensor is float16"),
        (3, no_tensor, "no list of tensors under 'fp32_flat_groups'"),
        (3, odd_shape, r"gives 'up.weight' the shape \(-1, 5\)"),
        (3, no_slice, "no slice of the frozen 'tower.weight'"),
        (3, unnamed, "'lost.weight' is in a model file, but no shard says how it is cut"),
        (2, no_module, "no dict under 'module'"),
        (2, objects, "no tensor under 'module.up.weight'"),
        (2, uncounted, "do not say among how many processes"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path: Path, stage: int, change: Any, words: str) -> None:
    folder = written(tmp_path, stage, change)
    with pytest.raises(CheckpointError, match=words):
        deepspeed.read(folder)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("echo it ran > evil",)


@pytest.mark.parametrize("ending", ["model_states.pt", "rank_1_mp_rank_00_optim_states.pt"])
def test_no_object_of_a_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path, 2, lambda trees: named(trees, ending).update(loss_scaler=Evil()))
    with pytest.raises(UnsafeCheckpoint, match=r"posix\.system"):
        deepspeed.read(folder)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["notes.txt", "zero_pp_rank_0_mp_rank_00_optim_states.pt.tmp"])
def test_what_is_no_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / name).write_text("")
    assert not deepspeed.is_run(tmp_path)
    assert not deepspeed.is_run(tmp_path / "sub" / name)
    with pytest.raises(UnknownLayout, match="no DeepSpeed checkpoint"):
        deepspeed.read(tmp_path)
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        deepspeed.read(tmp_path / "gone")
    assert all(deepspeed.is_run(FIXTURES / case) for case in CASES)


# -- written anew ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_writes_these_files(tmp_path: Path) -> None:
    """Two processes of deepspeed train and save: what is read equals what deepspeed itself makes of the files."""
    cases = ("zero2", "zero3")  # ten seconds each on two idle cores
    program = [sys.executable, str(FIXTURES / "make.py"), str(tmp_path), *cases]
    subprocess.run(program, check=True, capture_output=True, timeout=280)
    for case in cases:
        assert_equal(deepspeed.read(tmp_path / case), expected(case, tmp_path))
        names = {str(file.relative_to(tmp_path)) for file in (tmp_path / case).rglob("*.pt")}
        assert names == {str(file.relative_to(FIXTURES)) for file in (FIXTURES / case).rglob("*.pt")}
