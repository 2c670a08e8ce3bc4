"""Torch zip files: tensors come out, and whatever a crafted pickle asks for does not run."""

import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from lavish.checkpoints import pickles
from lavish.common.errors import CheckpointError, UnsafeCheckpoint

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def torch_zip(file: Path, pickled: bytes, records: dict[str, bytes] | None = None, compression: int = 0) -> Path:
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        for name, content in (records or {}).items():
            archive.writestr(f"archive/{name}", content)
    return file


def rewrite(file: Path, change) -> Path:
    """Write the zip file again with `change(name, content) -> (name, content)` applied to each record."""
    with zipfile.ZipFile(file) as archive:
        records = [change(name.partition("/")[2], archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records:
            archive.writestr(f"archive/{name}", content)
    return file


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(6).reshape(2, 3).to(dtype)
    torch.save({"a": value}, tmp_path / "x.bin")
    tensors = pickles.load_tensors(tmp_path / "x.bin")
    assert tensors.meta("a") == ((2, 3), dtype)
    assert torch.equal(tensors["a"], value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_what_torch_saves(tmp_path: Path, protocol: int) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = OrderedDict(
        whole=base,
        turned=base.t(),
        part=base[1:3, ::2],
        scalar=torch.tensor(3.5),
        empty=torch.zeros(0, 3),
        parameter=nn.Parameter(torch.ones(2)),
        **nn.BatchNorm1d(3).state_dict(),
    )
    torch.save(tensors, tmp_path / "x.bin", pickle_protocol=protocol)
    read = pickles.load_tensors(tmp_path / "x.bin")
    assert list(read) == list(tensors)
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert read["turned"].stride() == base.t().stride()


def test_a_module_state_dict_with_its_metadata(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    read = pickles.load_tensors(tmp_path / "x.pth")
    assert all(torch.equal(read[name], value) for name, value in net.state_dict().items())


def test_a_tree_around_the_tensors(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.ones(2)}, "epoch": 3, "lr": [0.1, None], "done": True}, tmp_path / "x.pth")
    tree = pickles.read_tree(tmp_path / "x.pth")
    assert tree["model"]["a"].shape == (2,)
    assert (tree["epoch"], tree["lr"], tree["done"]) == (3, [0.1, None], True)
    with pytest.raises(CheckpointError, match="holds a dict under 'model'"):
        pickles.load_tensors(tmp_path / "x.pth")


# Crafted pickles. Each would write the marker if anything of it ran.


class Calls:
    def __init__(self, function, *arguments) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def crafted(marker: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> (pickle, the name that the error must show)."""
    touch = f"touch {marker}"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    attacks = {
        "reduce": (b"\x80\x02cos\nsystem\n(" + text(touch) + b"tR.", "os.system"),
        "posix": (b"\x80\x02cposix\nsystem\n(" + text(touch) + b"tR.", "posix.system"),
        "eval": (b"\x80\x02cbuiltins\neval\n(" + text(code) + b"tR.", "builtins.eval"),
        "old eval": (b"\x80\x02c__builtin__\neval\n(" + text(code) + b"tR.", "__builtin__.eval"),
        "stack global": (b"\x80\x04" + text("os") + text("system") + b"\x93(" + text(touch) + b"tR.", "os.system"),
        "dotted": (b"\x80\x04" + text("torch") + text("os.system") + b"\x93)R.", "torch.os.system"),
        "inst": (b"(" + text(touch) + b"ios\nsystem\n.", "os system"),
        "obj": (b"(cos\nsystem\n" + text(touch) + b"o.", "os.system"),
        "newobj": (b"\x80\x02csubprocess\nPopen\n(" + text(touch) + b"t\x81.", "subprocess.Popen"),
        "newobj_ex": (b"\x80\x04csubprocess\nPopen\n(" + text(touch) + b"t}\x92.", "subprocess.Popen"),
        "build": (b"\x80\x02ctypes\nSimpleNamespace\n)R}" + text("a") + b"K\x01sb.", "types.SimpleNamespace"),
        "extension": (b"\x80\x02\x82\x01.", "EXT1"),
        "hub": (pickle.dumps({"a": Calls(torch.hub.load, str(marker))}, 2), "torch.hub.load"),
        "torch.load": (pickle.dumps({"a": Calls(torch.load, str(marker))}, 2), "torch.serialization.load"),
        "from bytes": (pickle.dumps(Calls(torch.storage._load_from_bytes, b"x"), 2), "torch.storage._load_from_bytes"),
        "getattr": (pickle.dumps(Calls(getattr, "a", "b"), 4), "builtins.getattr"),
        "partial": (b"\x80\x02cfunctools\npartial\n(cos\nsystem\n" + text(touch) + b"tR.", "functools.partial"),
        "class": (pickle.dumps(Path("x"), 4), "pathlib."),
        "dtype": (pickle.dumps({"a": torch.float32}, 2), "torch.float32"),
        "reduce on a string": (b"\x80\x02" + text("os.system") + b"(" + text(touch) + b"tR.", "calls a str"),
        "a rebuilder's state": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "sets the state of a"),
        "a rebuilder's arguments": (b"\x80\x02ctorch._utils\n_rebuild_parameter\n)R.", "in a way that torch does not"),
    }
    nested = Calls(OrderedDict, [("a", Calls(eval, code))])
    return attacks | {"nested": (pickle.dumps({"w": [{"x": (nested,)}]}, 4), "builtins.eval")}


@pytest.mark.parametrize("attack", sorted(crafted(Path("marker"))))
def test_a_crafted_pickle_does_not_run(tmp_path: Path, attack: str) -> None:
    marker = tmp_path / "marker"
    pickled, name = crafted(marker)[attack]
    file = torch_zip(tmp_path / "pytorch_model.bin", pickled)
    with pytest.raises(UnsafeCheckpoint) as caught:
        pickles.load_tensors(file)
    assert name in str(caught.value)
    assert str(file) in str(caught.value)
    assert not marker.exists()


def test_the_crafted_pickles_would_have_run(tmp_path: Path) -> None:
    """The attacks are real: the plain unpickler runs them."""
    for attack in ("reduce", "eval", "stack global", "inst", "obj", "nested"):
        marker = tmp_path / attack.replace(" ", "_")
        pickle.Unpickler(io.BytesIO(crafted(marker)[attack][0])).load()
        assert marker.exists(), attack


@pytest.mark.parametrize("name", ["training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state_0.pth"])
def test_files_of_a_training_run_are_never_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(UnsafeCheckpoint, match="never opened"):
        pickles.load_tensors(tmp_path / name)  # does not exist: opening it would be another error


# Storages and views


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.arange(8, dtype=torch.float32)}, tmp_path / "x.bin")
    return tmp_path / "x.bin"


def test_a_renamed_storage(saved: Path) -> None:
    rewrite(saved, lambda name, content: ("data/7" if name == "data/0" else name, content))
    with pytest.raises(CheckpointError, match="needs storage '0' and the zip file holds no data/0"):
        pickles.load_tensors(saved)


@pytest.mark.parametrize("nbytes", [0, 28, 36])
def test_a_storage_of_another_size(saved: Path, nbytes: int) -> None:
    rewrite(saved, lambda name, content: (name, b"\0" * nbytes if name == "data/0" else content))
    with pytest.raises(CheckpointError, match="storage '0' should be 32 plain bytes"):
        pickles.load_tensors(saved)


def storage(key: bytes = b"0", numel: bytes = b"K\x08", kind: bytes = b"FloatStorage") -> bytes:
    head = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX" + struct.pack("<I", len(key)) + key
    return head + b"X\x03\0\0\0cpu" + numel + b"tQ"


def tensor(view: bytes, stored: bytes | None = None) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + (stored or storage()) + view + b"\x89}tR"


BIG = b"\x8a\x09" + (2**63).to_bytes(9, "little")
HUGE = b"\x8a\x06" + (2**40).to_bytes(6, "little")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (tensor(b"K\x00K\x09\x85K\x01\x85"), "reaches beyond its storage"),
        (tensor(b"K\x01K\x08\x85K\x01\x85"), "reaches beyond its storage"),
        (tensor(b"K\x00K\x02K\x04\x86K\x08K\x01\x86"), "reaches beyond its storage"),
        (tensor(b"K\x00" + HUGE + b"\x85K\x00\x85"), "reaches beyond its storage"),
        (tensor(b"J\xff\xff\xff\xffK\x04\x85K\x01\x85"), "is damaged"),
        (tensor(b"K\x04K\x04\x85J\xff\xff\xff\xff\x85"), "is damaged"),
        (tensor(b"K\x00" + BIG + b"\x85K\x01\x85"), "is damaged"),
        (tensor(b"K\x00K\x04\x85K\x01K\x01\x86"), "is damaged"),
        (tensor(b"K\x00(" + b"K\x01" * 65 + b"t(" + b"K\x01" * 65 + b"t"), "is damaged"),
        (tensor(b"K\x00K\x04\x85K\x01\x85", storage(numel=HUGE)), "should be 4398046511104 plain bytes"),
        (tensor(b"K\x00K\x04\x85K\x01\x85", storage(numel=BIG)), "is damaged"),
        (tensor(b"K\x00K\x04\x85K\x01\x85", storage(key=b"../data.pkl")), "holds no data/../data.pkl"),
        (tensor(b"K\x00K\x04\x85K\x01\x85", storage(kind=b"QInt8Storage")), "QInt8Storage"),
        (tensor(b"K\x00K\x04\x85K\x01\x85", storage() + storage(kind=b"IntStorage")), "described in two ways"),
        (b"K\x01K\x02tQ", "is damaged"),
        (b"}K\x01K\x02\x86K\x03s", "is damaged"),
        (b"}(K\x01u", "is damaged"),
        (b"K\x01a", "is damaged"),
        (b"h\x05", "is damaged"),
        (b"t", "is damaged"),
        (b"\xff", "is damaged"),
        (b"K", "is damaged"),
        (b"K\x01", "not a dict of tensors"),
        (b"}X\x01\0\0\0aK\x01s", "holds a int under 'a'"),
    ],
)
def test_a_damaged_or_crafted_description(tmp_path: Path, value: bytes, says: str) -> None:
    file = torch_zip(tmp_path / "x.bin", b"\x80\x02" + value + b".", {"data/0": b"\0" * 32})
    with pytest.raises(CheckpointError) as caught:
        pickles.load_tensors(file)
    assert says in str(caught.value)


def test_the_description_used_above_is_one_that_torch_reads(tmp_path: Path) -> None:
    value = b"\x80\x02}X\x01\0\0\0a" + tensor(b"K\x01K\x03\x85K\x02\x85") + b"s."
    file = torch_zip(tmp_path / "x.bin", value, {"data/0": torch.arange(8.0).numpy().tobytes()})
    assert pickles.load_tensors(file)["a"].tolist() == [1, 3, 5]


def test_a_compressed_or_endless_record(tmp_path: Path) -> None:
    bomb = torch_zip(tmp_path / "x.bin", b"\0" * 100_000_000, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"data\.pkl claims 100000000 bytes or is compressed"):
        pickles.load_tensors(bomb)


def test_a_storage_that_is_compressed(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(saved, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if name.endswith("data/0") else zipfile.ZIP_STORED)
    with pytest.raises(CheckpointError, match="its entry has 32 compressed"):
        pickles.load_tensors(saved)


def test_a_record_twice(saved: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(saved, "a") as archive:
        archive.writestr("x/data/0", b"\0" * 32)
    with pytest.raises(CheckpointError, match="twice"):
        pickles.load_tensors(saved)


def test_a_big_endian_file(saved: Path) -> None:
    rewrite(saved, lambda name, content: (name, b"big" if name == "byteorder" else content))
    with pytest.raises(CheckpointError, match="big-endian"):
        pickles.load_tensors(saved)


def test_a_zip_that_is_not_of_torch(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match=r"holds no data\.pkl"):
        pickles.load_tensors(tmp_path / "x.bin")


def test_the_format_before_torch_1_6_is_refused_with_a_way_out(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"saved by torch before 1\.6.*save it as safetensors"):
        pickles.load_tensors(tmp_path / "x.bin")


def test_truncated_and_altered_files_give_typed_errors(saved: Path) -> None:
    """Whatever a byte is changed to, the answer is the tensors or a CheckpointError."""
    whole = saved.read_bytes()
    chance = random.Random(0)
    variants = [whole[:length] for length in range(0, len(whole), 13)]
    for _ in range(1500):
        altered = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            altered[chance.randrange(len(whole))] = chance.randrange(256)
        variants.append(bytes(altered))
    for variant in variants:
        saved.write_bytes(variant)
        try:
            tensors = pickles.load_tensors(saved)
        except CheckpointError:
            continue
        for name in tensors:
            assert tensors[name].numel() <= 8


def test_what_deepspeed_saves_beside_the_weights(tmp_path: Path) -> None:
    state = {
        "module": {"a": torch.ones(2)},
        "param_shapes": [OrderedDict(a=torch.Size([2]))],
        "sparse_tensor_module_names": {"embed"},
        "none": set(),
        "ds_config": {"zero_optimization": {"stage": 2}, "steps": 10},
    }
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    tree = pickles.read_tree(tmp_path / "mp_rank_00_model_states.pt")
    assert tree["module"]["a"].shape == (2,)
    assert tree["param_shapes"] == [{"a": (2,)}]
    assert (tree["sparse_tensor_module_names"], tree["none"]) == (("embed",), ())
