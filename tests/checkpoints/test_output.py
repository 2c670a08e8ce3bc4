"""Writing a plan: atomic, resumable, refused where something is in the way."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lavish.checkpoints import hf
from lavish.checkpoints.output import (
    JOURNAL,
    Output,
    SafetensorsFormat,
    TargetOptions,
    TargetPlan,
    TensorFile,
    partial_folder,
    safetensors_files,
    write_plan,
)
from lavish.common.errors import CheckpointError, ConfigError, OutputError

IDENTITY = {"source": "a", "dtype": None}


def output(name: str, value: torch.Tensor, made: list[str] | None = None) -> Output:
    def make() -> torch.Tensor:
        if made is not None:
            made.append(name)
        return value

    return Output(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), make)


def values(count: int = 6) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {f"layer.{index}": torch.randn(10, 10, generator=draw) for index in range(count)}


def a_plan(made: list[str] | None = None, max_shard_bytes: int = 800, count: int = 6) -> TargetPlan:
    outputs = [output(name, value, made) for name, value in values(count).items()]
    files, texts = safetensors_files(outputs, max_shard_bytes)
    return TargetPlan(files, {**texts, "config.json": b"{}", "1/deep.txt": b"x"})


def write(destination: Path, plan: TargetPlan | None = None, **options: object) -> int:
    return write_plan(plan or a_plan(), destination, identity=IDENTITY, **options)  # pyright: ignore[reportArgumentType]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    card = tmp_path / "card.md"
    card.write_text("hello")
    plan = a_plan()
    plan = TargetPlan(plan.files, plan.texts, copies={"README.md": card})
    assert write(tmp_path / "new", plan, progress=lambda done, total: seen.append((done, total))) == 0
    assert sorted(str(file.relative_to(tmp_path / "new")) for file in (tmp_path / "new").rglob("*")) == [
        "1",
        "1/deep.txt",
        "README.md",
        "config.json",
        *(f"model-{index:05}-of-00003.safetensors" for index in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    found = hf.read(tmp_path / "new")
    assert all(torch.equal(found[name], value) for name, value in values().items())
    assert seen == [(400 * index, 2400) for index in range(1, 7)]
    assert not partial_folder(tmp_path / "new").exists()


def test_a_single_file(tmp_path: Path) -> None:
    files, _ = safetensors_files([output("a", torch.ones(3))], 1000)
    write(tmp_path / "a.safetensors", TargetPlan(files))
    assert torch.equal(hf.read(tmp_path / "a.safetensors")["a"], torch.ones(3))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]
    with pytest.raises(ConfigError, match="the name of one file, and 3 are to be written"):
        write(tmp_path / "b.safetensors")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("file", "dangling", "folder"):
        with pytest.raises(ConfigError, match="is there already, and nothing is overwritten"):
            write(tmp_path / name)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["dangling", "file", "folder"]


class Stopped(Exception):
    """A kill, as far as the driver sees one."""


def interrupted(destination: Path, after: int, **options: object) -> None:
    """Stop a conversion after so many bytes of tensors."""

    def stop(done: int, total: int) -> None:
        if done >= after:
            raise Stopped

    with pytest.raises(Stopped):
        write(destination, progress=stop, **options)


@pytest.mark.parametrize("after", [400, 800, 1200, 2000, 2400])
@pytest.mark.parametrize("resume_bytes", [1, 800, 10**9])
def test_a_rerun_goes_on(tmp_path: Path, after: int, resume_bytes: int) -> None:
    interrupted(tmp_path / "new", after, resume_bytes=resume_bytes)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError):
        hf.read(partial_folder(tmp_path / "new"))
    made: list[str] = []
    resumed = write(tmp_path / "new", a_plan(made))
    if resume_bytes == 1:  # each tensor is noted, but the last of a file, which ends with the file itself
        assert resumed == after - (400 if after % 800 == 0 else 0)
    assert len(made) == 6 - resumed // 400
    found = hf.read(tmp_path / "new")
    assert all(torch.equal(found[name], value) for name, value in values().items())
    assert not list((tmp_path / "new").glob(".*"))


def test_a_torn_journal_goes_back_to_its_last_whole_line(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", 1200, resume_bytes=1)
    journal = partial_folder(tmp_path / "new") / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    assert write(tmp_path / "new") == 800
    assert all(torch.equal(hf.read(tmp_path / "new")[name], value) for name, value in values().items())


@pytest.mark.parametrize("boot", ["another run of the machine", None])
def test_after_a_crash_of_the_machine_only_whole_files_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, boot: str | None
) -> None:
    from lavish.checkpoints import output as driver

    interrupted(tmp_path / "new", 1200, resume_bytes=1)  # a file and a half
    other = tmp_path / "boot_id"
    if boot is not None:
        other.write_text(boot)
    monkeypatch.setattr(driver, "BOOT_ID", other)
    made: list[str] = []
    assert write(tmp_path / "new", a_plan(made)) == 800
    assert len(made) == 4
    assert all(torch.equal(hf.read(tmp_path / "new")[name], value) for name, value in values().items())


def test_without_a_boot_id_every_point_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lavish.checkpoints import output as driver

    monkeypatch.setattr(driver, "BOOT_ID", tmp_path / "nowhere")
    interrupted(tmp_path / "new", 1200, resume_bytes=1)
    assert write(tmp_path / "new") == 1200


def test_another_conversion_does_not_go_on_with_it(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", 400)
    with pytest.raises(ConfigError, match=r"begun with dtype=None and now has dtype='float16'.*remove that folder"):
        write_plan(a_plan(), tmp_path / "new", identity={**IDENTITY, "dtype": "float16"})
    with pytest.raises(ConfigError, match="another version of lavish"):
        write(tmp_path / "new", a_plan(count=5))
    write(tmp_path / "new")


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    partial_folder(tmp_path / "new").mkdir()
    (partial_folder(tmp_path / "new") / "mine").write_text("mine")
    with pytest.raises(ConfigError, match="holds 'mine' and no journal"):
        write(tmp_path / "new")


def test_what_the_journal_promises_must_be_there(tmp_path: Path) -> None:
    interrupted(tmp_path / "new", 1200, resume_bytes=1)
    (partial_folder(tmp_path / "new") / "model-00001-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"is not there; remove .*partial and start again"):
        write(tmp_path / "new")


def test_a_name_never_leaves_the_destination(tmp_path: Path) -> None:
    for name in ("../x", "/x", "a/../../x", "", "a\\b", "a\0b"):
        for plan in (TargetPlan((TensorFile(name, (), SafetensorsFormat),)), TargetPlan((), {name: b""})):
            with pytest.raises(ConfigError, match="does not lie in it"):
                write(tmp_path / "new", plan)
    with pytest.raises(ConfigError, match="written twice"):
        write(tmp_path / "new", TargetPlan((TensorFile("x", (), SafetensorsFormat),), {"x": b""}))
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_is_what_it_was_announced_to_be(tmp_path: Path) -> None:
    wrong = Output("a", (3,), "float32", lambda: torch.ones(4))
    with pytest.raises(CheckpointError, match=r"'a' was to be \(3,\) in float32 and came as \(4,\)"):
        write(tmp_path / "new", TargetPlan((TensorFile("a.safetensors", (wrong,), SafetensorsFormat),)))


def test_a_source_that_is_gone_is_told_apart_from_a_bad_disk(tmp_path: Path) -> None:
    def gone() -> torch.Tensor:
        raise FileNotFoundError("no source any more")

    def plan(make: Callable[[], torch.Tensor]) -> TargetPlan:
        outputs = (output("b", torch.ones(3), made), Output("a", (3,), "float32", make))
        return TargetPlan((TensorFile("a.safetensors", outputs, SafetensorsFormat),))

    made: list[str] = []
    with pytest.raises(CheckpointError, match="'a' cannot be read from its source: no source any more"):
        write(tmp_path / "new", plan(gone), resume_bytes=1)
    assert [entry.name for entry in tmp_path.iterdir()] == [partial_folder(tmp_path / "new").name]
    write(tmp_path / "new", plan(lambda: torch.zeros(3)), resume_bytes=1)  # the disk came back
    assert made == ["b"]
    assert hf.read(tmp_path / "new" / "a.safetensors")["a"].tolist() == [0, 0, 0]


def test_a_source_that_is_wrong_leaves_nothing(tmp_path: Path) -> None:
    def wrong() -> torch.Tensor:
        raise CheckpointError("'a' holds 2 values beyond float16")

    files = (TensorFile("a.safetensors", (Output("a", (3,), "float32", wrong),), SafetensorsFormat),)
    with pytest.raises(CheckpointError, match="beyond float16"):
        write(tmp_path / "new", TargetPlan(files))
    assert list(tmp_path.iterdir()) == []  # the same call would stop there again


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    huge = Output("a", (2**50,), "float32", lambda: torch.ones(0))
    with pytest.raises(OutputError, match=r"needs 4503599.63 GB, and the disk has"):
        write(tmp_path / "new", TargetPlan((TensorFile("a.safetensors", (huge,), SafetensorsFormat),)))


def in_process(code: str, *arguments: object) -> subprocess.Popen[str]:
    program = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom test_output import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_full_disk_is_an_error_of_its_own_and_the_rest_goes_on(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the system refuses to let a file grow, as it does when the disk is full."""
    code = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "try:\n    write(Path(sys.argv[1]), resume_bytes=1)\nexcept OutputError as error:\n    print(error)\n"
    )
    process = in_process(code, tmp_path / "new")
    told, errors = process.communicate(timeout=60)
    assert "cannot be written (File too large)" in told, errors
    assert "Free some space and run the same command again: it goes on from there." in told
    assert not (tmp_path / "new").exists()
    assert write(tmp_path / "new") == 400
    assert all(torch.equal(hf.read(tmp_path / "new")[name], value) for name, value in values().items())


def slowly(plan: TargetPlan) -> TargetPlan:
    """Let each tensor take a while, so that a kill hits the middle."""

    def slow(make: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def made() -> torch.Tensor:
            time.sleep(0.05)
            return make()

        return made

    files = [
        TensorFile(file.name, tuple(Output(o.name, o.shape, o.dtype, slow(o.make)) for o in file.outputs), file.format)
        for file in plan.files
    ]
    return TargetPlan(tuple(files), plan.texts)


def test_kill_9_in_the_middle_leaves_nothing_that_loads_and_a_rerun_goes_on(tmp_path: Path) -> None:
    process = in_process("write(Path(sys.argv[1]), slowly(a_plan(count=40)), resume_bytes=1)", tmp_path / "new")
    journal = partial_folder(tmp_path / "new") / JOURNAL
    deadline = time.monotonic() + 60
    while (journal.read_bytes().count(b"\n") if journal.exists() else 0) < 8 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError):
        hf.read(partial_folder(tmp_path / "new"))
    made: list[str] = []
    resumed = write(tmp_path / "new", a_plan(made, count=40))
    assert resumed >= 4 * 400
    assert len(made) == 40 - resumed // 400
    assert all(torch.equal(hf.read(tmp_path / "new")[name], value) for name, value in values(40).items())


def test_two_processes_do_not_write_one_conversion(tmp_path: Path) -> None:
    process = in_process("write(Path(sys.argv[1]), slowly(a_plan(count=100)), resume_bytes=1)", tmp_path / "new")
    journal = partial_folder(tmp_path / "new") / JOURNAL
    while not journal.exists() or not journal.stat().st_size:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    with pytest.raises(ConfigError, match="another process is converting to it"):
        write(tmp_path / "new", a_plan(count=100))
    process.kill()
    process.communicate(timeout=60)


# -- dtypes ------------------------------------------------------------------------------------------------------------


def test_a_change_of_dtype_looks_at_the_values() -> None:
    values = torch.tensor([1.0, -70000.0, 1e30, float("inf"), float("nan"), -2.0])
    with pytest.raises(CheckpointError, match=r"'w': 2 of 6 values do not fit float16, the largest is 1e\+30"):
        TargetOptions().cast("w", values, "float16")
    options = TargetOptions(clamp=True)
    found = options.cast("w", values, "float16")
    assert found.dtype == torch.float16
    assert found[[0, 1, 2, 3, 5]].tolist() == [1.0, -65504.0, 65504.0, float("inf"), -2.0]
    assert found[4].isnan()
    assert options.clamped == {"w": 2}
    assert TargetOptions().cast("w", torch.tensor([65519.0]), "float16").item() == 65504.0  # rounds down: it fits
    assert torch.equal(TargetOptions().cast("w", values[:3], "bfloat16"), values[:3].to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="1 of 1 values do not fit float32"):
        TargetOptions().cast("w", torch.tensor([1e300], dtype=torch.float64), "float32")


@pytest.mark.parametrize("to", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64"])
def test_a_cast_in_pieces_is_torch_s(stored: str, to: str) -> None:
    values = torch.randn(70, 1000, generator=torch.Generator().manual_seed(1)).to(getattr(torch, stored))
    values[0, :4] = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0])
    for given in (values, values[:, :3], values.t(), values[:0], values[0, 0]):
        found = TargetOptions().cast("w", given, to)
        assert torch.equal(found.nan_to_num(7.0), given.to(getattr(torch, to)).nan_to_num(7.0))


def test_memory_is_lent_again_when_it_was_written(tmp_path: Path) -> None:
    drawn = values(20)
    save_file(drawn, tmp_path / "a.safetensors")
    stored, options = hf.read(tmp_path / "a.safetensors"), TargetOptions(dtype="float64")
    outputs = [options.take(name, stored, info, (name,)) for name, info in stored.infos.items()]
    files, texts = safetensors_files(outputs, 4000)
    write(tmp_path / "new", TargetPlan(files, texts))
    assert all(torch.equal(hf.read(tmp_path / "new")[name], value.double()) for name, value in drawn.items())
    first, second = options.spare.lend(800), options.spare.lend(800)
    assert first.data_ptr() != second.data_ptr()
    options.spare.take_back(first)
    assert options.spare.lend(700).data_ptr() == first.data_ptr()


def test_whole_numbers_and_flags_keep_their_dtype() -> None:
    options = TargetOptions(dtype="float16")
    kept = ["int64", "bool", "uint8", "float8_e4m3fn"]
    assert [options.dtype_of(name) for name in kept] == kept
    assert [options.dtype_of(name) for name in ("float32", "bfloat16", "float64")] == ["float16"] * 3
    assert TargetOptions().dtype_of("float64") == "float64"


def test_the_index_lists_every_tensor(tmp_path: Path) -> None:
    write(tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2400}
    assert set(index["weight_map"]) == set(values())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 700
