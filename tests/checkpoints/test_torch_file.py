"""Torch zip files written as a stream: torch reads them, and so does lavish; a writer that was killed goes on."""

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lavish.checkpoints.pickles import STORAGE_DTYPES, read_tree
from lavish.checkpoints.tensor_map import TensorMap
from lavish.checkpoints.torch_file import ALIGNMENT, RecordSums, TorchZipFormat
from lavish.common.errors import CheckpointError


@dataclass(frozen=True)
class Written:
    """What the format asks of an output."""

    name: str
    value: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def dtype(self) -> str:
        return str(self.value.dtype).removeprefix("torch.")

    @property
    def data(self) -> memoryview:
        flat = self.value.contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write(file: Path, outputs: Sequence[Written], under: str | None = None, stop_after: int | None = None) -> Path:
    """Write a file; with `stop_after` a second writer goes on after so many tensors."""
    form = TorchZipFormat(under)
    with file.open("wb") as handle:
        handle.writelines(form.begin(outputs))
        for index, output in enumerate(outputs):
            if index == stop_after:
                saved = json.loads(json.dumps(form.state()))
                form = TorchZipFormat(under)
                form.restore(saved)
            handle.writelines(form.tensor(output, output.data, handle.tell()))
        handle.writelines(form.end(handle.tell()))
    return file


def values() -> dict[str, torch.Tensor]:
    kinds = [getattr(torch, name) for name in dict.fromkeys(STORAGE_DTYPES.values())]
    tensors = {f"kind.{kind}": (torch.rand(3, 5) * 9).to(kind) for kind in kinds}
    return {**tensors, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "ключ": torch.rand(7)}


@pytest.mark.parametrize("under", [None, "module", "model"])
@pytest.mark.parametrize("stop_after", [None, 0, 4])
def test_torch_and_lavish_read_what_was_written(tmp_path: Path, under: str | None, stop_after: int | None) -> None:
    expected = values()
    file = write(tmp_path / "x.pt", [Written(*item) for item in expected.items()], under, stop_after)
    loaded = torch.load(file, weights_only=True)
    loaded = loaded if under is None else loaded[under]
    tree = read_tree(file)
    ours = TensorMap(file, tree if under is None else tree[under])
    assert list(loaded) == list(ours) == list(expected)
    for name, value in expected.items():
        assert loaded[name].dtype == ours[name].dtype == value.dtype
        assert torch.equal(loaded[name], value), name
        assert torch.equal(ours[name], value), name


def test_tensors_are_aligned_and_checksums_right(tmp_path: Path) -> None:
    file = write(tmp_path / "x.pt", [Written(*item) for item in values().items()])
    assert all(info.offset % ALIGNMENT == 0 for info in read_tree(file).values())
    assert torch.load(file, weights_only=True, mmap=True)["scalar"] == 2.5
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None


def test_equal_tensors_give_equal_files(tmp_path: Path) -> None:
    outputs = [Written("a", torch.arange(9.0))]
    one, other = write(tmp_path / "one.pt", outputs), write(tmp_path / "other.pt", outputs, stop_after=0)
    assert one.read_bytes() == other.read_bytes()


def test_offsets_beyond_4_gb(tmp_path: Path) -> None:
    """A hole before the second tensor stands for the bytes of a large model."""
    file, outputs, form = (
        tmp_path / "x.pt",
        [Written("a", torch.rand(3)), Written("b", torch.rand(400))],
        TorchZipFormat(),
    )
    with file.open("wb") as handle:
        handle.writelines(form.begin(outputs))
        for output in outputs:
            handle.writelines(form.tensor(output, output.data, handle.tell()))
            handle.seek(handle.tell() + 5_000_000_000)
        handle.writelines(form.end(handle.tell()))
    ours = TensorMap(file, read_tree(file))
    assert ours.info("b").offset > 2**32
    loaded = torch.load(file, weights_only=True, mmap=True)
    for output in outputs:
        assert torch.equal(loaded[output.name], output.value)
        assert torch.equal(ours[output.name], output.value)


@pytest.mark.slow
def test_a_tensor_beyond_4_gb(tmp_path: Path) -> None:
    file, form = tmp_path / "x.pt", TorchZipFormat()
    large = torch.from_file(str(tmp_path / "zeros"), shared=True, size=2**32 + 64, dtype=torch.uint8)  # a hole
    outputs = [Written("a", large), Written("b", torch.rand(4))]
    with file.open("wb") as handle:
        handle.writelines(form.begin(outputs))
        for output in outputs:
            for piece in form.tensor(output, output.data, handle.tell()):
                handle.seek(handle.tell() + len(piece)) if len(piece) > 2**32 else handle.write(piece)
        handle.writelines(form.end(handle.tell()))
    ours = TensorMap(file, read_tree(file))
    assert ours.info("a").numel == large.numel()
    assert torch.equal(ours["b"], outputs[1].value)
    loaded = torch.load(file, weights_only=True, mmap=True)
    assert loaded["a"].numel() == large.numel()
    assert torch.equal(loaded["b"], outputs[1].value)


def test_what_torch_has_no_storage_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' is float8_e4m3fn, which torch's zip files have no storage for"):
        write(tmp_path / "x.pt", [Written("a", torch.zeros(2, dtype=torch.float8_e4m3fn))])


def test_one_name_twice(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' would be written twice"):
        write(tmp_path / "x.pt", [Written("a", torch.zeros(2)), Written("a", torch.zeros(3))])


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 10**6])
def test_checksums_while_a_file_is_read(tmp_path: Path, size: int) -> None:
    """Of what torch wrote and of what lavish wrote, in chunks of any size; one changed bit names its record."""
    ours = write(tmp_path / "ours.pt", [Written(*item) for item in values().items()])
    torch.save(values(), tmp_path / "torch.pt")

    def wrong(file: Path) -> list[str]:
        sums, content = RecordSums(file), file.read_bytes()
        for offset in range(0, len(content), size):
            sums.add(content[offset : offset + size], offset)
        return sums.wrong()

    assert not wrong(ours)
    assert not wrong(tmp_path / "torch.pt")
    at = read_tree(ours)["kind.torch.int64"].offset
    with ours.open("r+b") as handle:
        handle.seek(at + 9)
        byte = handle.read(1)[0]
        handle.seek(at + 9)
        handle.write(bytes([byte ^ 16]))
    number = list(values()).index("kind.torch.int64")
    assert wrong(ours) == [f"archive/data/{number}"]


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(5)}, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert TensorMap(tmp_path / "x.pt", read_tree(tmp_path / "x.pt"))["a"].tolist() == [0, 1, 2, 3, 4]
    sums = RecordSums(tmp_path / "x.pt")
    sums.add((tmp_path / "x.pt").read_bytes(), 0)
    assert not sums.wrong()


def test_what_is_no_zip_file_has_none(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"0" * 100)
    sums = RecordSums(tmp_path / "x.safetensors")
    sums.add(b"0" * 100, 0)
    assert not sums.wrong()
