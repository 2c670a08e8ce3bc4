"""The Hugging Face layout: what is read, and what is refused before anything is allocated."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lavish.checkpoints import hf
from lavish.common.errors import CheckpointError, MissingKeys, UnknownLayout, UnsafeCheckpoint

TENSORS = {
    "embed.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "norm.weight": torch.arange(4).to(torch.bfloat16),
    "steps": torch.tensor(7),
    "empty": torch.zeros(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def write_file(file: Path, header: dict | bytes, data: bytes = b"", header_bytes: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(raw) if header_bytes is None else header_bytes).to_bytes(8, "little") + raw + data)
    return file


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    shards = {"model-00001-of-00002.safetensors": ["a", "b"], "model-00002-of-00002.safetensors": ["c"]}
    for shard, names in shards.items():
        save_file({name: torch.full((2, 3), float(ord(name))) for name in names}, folder / shard)
    write_index(folder, {name: shard for shard, names in shards.items() for name in names})
    return folder


def write_index(folder: Path, weight_map: dict) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_single_file_reads_as_the_library_reads_it(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    for path in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        tensors = hf.read(path)
        assert set(tensors) == set(TENSORS)
        for name, expected in load_file(tmp_path / "model.safetensors").items():
            assert tensors.meta(name) == (tuple(expected.shape), expected.dtype)
            assert tensors[name].dtype == expected.dtype
            assert torch.equal(tensors[name], expected)
        assert tensors.nbytes == sum(value.nbytes for value in TENSORS.values())
        assert tensors.files == (tmp_path / "model.safetensors",)


def test_shards_read_as_one(sharded: Path) -> None:
    tensors = hf.read(sharded)
    assert {name: tensors[name][0, 0].item() for name in tensors} == {"a": 97, "b": 98, "c": 99}
    assert [file.name for file in tensors.files] == sorted(file.name for file in sharded.glob("*.safetensors"))
    assert hf.read(sharded / "model.safetensors.index.json").keys() == tensors.keys()


def test_bin_files_read_as_the_same_tensors(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    tensors = hf.read(tmp_path)
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)


def test_sharded_bin_files(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    weight_map = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tensors = hf.read(tmp_path)
    assert torch.equal(tensors["a"], torch.ones(2))
    assert torch.equal(tensors["b"], torch.zeros(3))


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even opened")
    (tmp_path / "training_args.bin").write_bytes(b"not even opened")
    assert list(hf.read(tmp_path)) == ["a"]


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
    hf.read(tmp_path)["a"].zero_()
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4))


def test_an_unknown_name_suggests_the_nearest(sharded: Path) -> None:
    save_file({"lm_head.weight": torch.ones(1)}, sharded / "model.safetensors")
    with pytest.raises(KeyError, match=r"lm_head\.weight"):
        hf.read(sharded)["lm_heat.weight"]


def test_39_gb_are_listed_in_under_a_second_without_torch(tmp_path: Path) -> None:
    """Eight sparse shards of the real size: only headers may be touched, in a process that does not import torch."""
    weight_map, per_shard, nbytes = {}, 150, 8192 * 4096
    for shard in range(8):
        name = f"model-{shard + 1:05}-of-00008.safetensors"
        header = {
            f"layers.{shard}.{i}": entry(i * nbytes, (i + 1) * nbytes, [4096, 4096], "BF16") for i in range(per_shard)
        }
        weight_map |= dict.fromkeys(header, name)
        file = write_file(tmp_path / name, header)
        os.truncate(file, file.stat().st_size + per_shard * nbytes)
    write_index(tmp_path, weight_map)
    script = (
        "import sys, time\n"
        "from lavish.checkpoints import hf\n"
        "start = time.process_time()\n"
        "tensors = hf.read(sys.argv[1])\n"
        "print(len(tensors), tensors.nbytes, time.process_time() - start, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    count, total, seconds, torch_imported = run.stdout.split()
    assert (int(count), int(total), torch_imported) == (1200, 1200 * nbytes, "False")
    assert float(seconds) < 1
    assert hf.read(tmp_path)["layers.7.149"].sum() == 0  # more than the memory is mapped, one tensor is read


def test_a_file_larger_than_the_memory_can_be_mapped(tmp_path: Path) -> None:
    nbytes = 1 << 38  # 256 GB
    file = write_file(tmp_path / "model.safetensors", {"a": entry(0, nbytes), "b": entry(nbytes, nbytes + 4)})
    try:
        os.truncate(file, file.stat().st_size + nbytes + 4)
    except OSError:
        pytest.skip("this file system has no sparse files of 256 GB")
    assert hf.read(tmp_path)["b"].tolist() == [0.0]


# What must be refused


@pytest.mark.parametrize(
    ("header", "data", "says"),
    [
        ({"a": entry(0, 16)}, b"\0" * 12, "truncated: 'a' ends at byte"),
        ({"a": entry(0, 16)}, b"\0" * 20, "4 bytes at its end belong to no tensor"),
        ({"a": entry(0, 16), "b": entry(8, 24)}, b"\0" * 24, "'b' overlaps 'a'"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, b"\0" * 16, "4 bytes before 'b' belong to no tensor"),
        ({"a": entry(0, 16, [2**40, 2**40])}, b"\0" * 16, "has shape"),
        ({"a": entry(0, 16, [2**62, 4, 0])}, b"\0" * 16, "has shape"),
        ({"a": entry(0, 0, [2**62, 2**62, 0])}, b"", "cannot be"),
        ({"a": entry(0, 16, [-4, -1])}, b"\0" * 16, "cannot be"),
        ({"a": entry(0, 16, [True, 4])}, b"\0" * 16, "cannot be"),
        ({"a": entry(0, 16, [1] * 65 + [4])}, b"\0" * 16, "cannot be"),
        ({"a": entry(0, 16, "44")}, b"\0" * 16, "cannot be"),
        ({"a": entry(16, 0, [4])}, b"\0" * 16, "cannot be"),
        ({"a": entry(0, 16, [4], "F4")}, b"\0" * 16, "lavish reads BOOL"),
        ({"a": entry(0, 16, [4], ["F32"])}, b"\0" * 16, "lavish reads BOOL"),
        ({"a": [0, 16]}, b"\0" * 16, "needs dtype, shape and data_offsets"),
        (b'{"a": {"dtype": "F32"', b"", "is not JSON"),
        (b"[" * 100_000, b"", "is not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", b"", "is not JSON"),
        (b"\xff\xfe{}", b"", "is not JSON"),
        (b"[]", b"", "is a list"),
        (
            b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},'
            b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
            b"\0",
            "names 'a' twice",
        ),
    ],
)
def test_a_wrong_safetensors_file_is_refused(tmp_path: Path, header: dict | bytes, data: bytes, says: str) -> None:
    write_file(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError, match=says) as caught:
        hf.read(tmp_path)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("header_bytes", [2**63, 10**9, 200])
def test_an_absurd_header_size_is_refused_before_it_is_read(tmp_path: Path, header_bytes: int) -> None:
    write_file(tmp_path / "model.safetensors", {"a": entry(0, 4)}, b"\0" * 4, header_bytes=header_bytes)
    with pytest.raises(CheckpointError, match=f"claims {header_bytes} bytes and the file has"):
        hf.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\x08\0\0"])
def test_a_file_of_a_few_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{len(content)} bytes are too few"):
        hf.read(tmp_path)


def test_every_truncation_of_a_file_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5)}, tmp_path / "whole")
    whole = (tmp_path / "whole").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            hf.read(tmp_path)


def test_a_file_that_changes_after_its_header_was_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5)}, tmp_path / "model.safetensors")
    tensors = hf.read(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 40)
    with pytest.raises(CheckpointError, match="is 40 now"):
        tensors["a"]


def test_a_missing_shard_names_what_to_fetch(sharded: Path) -> None:
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MissingKeys) as caught:
        hf.read(sharded)
    assert "1 of its 3 tensors are in files that are not here, first 'c'" in str(caught.value)
    assert "The index lists 2 shards and 1 are on disk; fetch model-00002-of-00002.safetensors." in str(caught.value)
    partial = hf.read(sharded, allow_absent=True)
    assert (list(partial), partial.absent) == (["a", "b"], ("model-00002-of-00002.safetensors",))


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(UnknownLayout, match=r"2 shards .* not their index; fetch model\.safetensors\.index\.json"):
        hf.read(sharded)


def test_an_index_and_shards_of_different_versions(sharded: Path) -> None:
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    write_index(sharded, {"a": first, "b": first, "c": first, "d": second})
    with pytest.raises(MissingKeys, match=r"'c' is in .*00001.*, which does not hold it \(.*00002.* does\)"):
        hf.read(sharded)


def test_an_index_whose_absent_shard_is_not_needed(sharded: Path) -> None:
    """Not complete, whatever `allow_absent`: otherwise `lavish inspect` praises what `lavish.load` refuses."""
    first, second, third = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2, 3))
    write_index(sharded, {"a": first, "b": third, "c": second})
    with pytest.raises(MissingKeys, match=r"'b' is in .*00003.*, which is not here \(.*00001.* does\)"):
        hf.read(sharded, allow_absent=True)


def test_the_same_name_in_two_shards(sharded: Path) -> None:
    save_file({"a": torch.ones(1), "c": torch.ones(1)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"both .*00001.* and .*00002.* hold 'a'"):
        hf.read(sharded)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 99999])
def test_an_index_that_is_none(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"index\.json(: needs a 'weight_map'| is not valid JSON| holds list)"):
        hf.read(sharded)


@pytest.mark.parametrize("name", ["../secret.safetensors", "{}/secret.safetensors", "sub/x", "..", "", "a\0"])
def test_an_index_that_leaves_the_folder(sharded: Path, name: str) -> None:
    save_file({"c": torch.ones(1)}, sharded.parent / "secret.safetensors")
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "c": name.replace("{}", str(sharded.parent))})
    with pytest.raises(UnsafeCheckpoint, match="not a plain file name"):
        hf.read(sharded)


def test_an_index_that_names_the_training_arguments(sharded: Path) -> None:
    (sharded / "training_args.bin").write_bytes(b"")
    write_index(sharded, {"a": "model-00001-of-00002.safetensors", "c": "training_args.bin"})
    with pytest.raises(UnsafeCheckpoint, match="never opened"):
        hf.read(sharded)


def test_a_link_out_of_the_folder(sharded: Path) -> None:
    outside = sharded.parent / "outside.safetensors"
    shutil.move(sharded / "model-00002-of-00002.safetensors", outside)
    (sharded / "model-00002-of-00002.safetensors").symlink_to(outside)
    with pytest.raises(UnsafeCheckpoint, match=r"is a link to .*outside\.safetensors, outside of the folder"):
        hf.read(sharded)


def test_links_inside_the_folder_and_to_the_folder_are_fine(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.rename(sharded / "moved")
    shard.symlink_to("moved")
    (sharded.parent / "link").symlink_to(sharded)
    assert len(hf.read(sharded.parent / "link")) == 3


def test_the_hub_cache_links_to_its_blobs(sharded: Path) -> None:
    repository = sharded.parent / "models--org--name"
    snapshot = repository / "snapshots" / "0123abc"
    blobs = repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sharded.iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert len(hf.read(snapshot)) == 3
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    (snapshot / "model-00001-of-00002.safetensors").symlink_to(sharded / "model-00001-of-00002.safetensors")
    with pytest.raises(UnsafeCheckpoint):
        hf.read(snapshot)


def test_a_folder_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="found nothing"):
        hf.read(tmp_path)
    (tmp_path / "weights.ckpt").touch()
    with pytest.raises(UnknownLayout, match=r"found weights\.ckpt"):
        hf.read(tmp_path)
    with pytest.raises(UnknownLayout, match="not a weight file"):
        hf.read(tmp_path / "weights.ckpt")
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        hf.read(tmp_path / "absent")
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(UnknownLayout, match="a link whose target is gone"):
        hf.read(tmp_path)


def test_many_small_tensors_are_listed_fast(tmp_path: Path) -> None:
    header = {f"t{i}": entry(4 * i, 4 * i + 4) for i in range(20_000)}
    write_file(tmp_path / "model.safetensors", header, b"\0" * 80_000)
    start = time.process_time()
    assert len(hf.read(tmp_path)) == 20_000
    assert time.process_time() - start < 2
