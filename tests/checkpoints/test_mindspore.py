"""MindSpore's files: every fixture bit by bit, the wire format's corners, ranks merged, and what is refused."""

import os
import shutil
import struct
import time
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lavish.checkpoints import mindspore
from lavish.checkpoints.mindspore import Layout
from lavish.checkpoints.mindspore_file import TYPES, read_file
from lavish.checkpoints.mindspore_format import MindSporeFormat, encode_strategy
from lavish.checkpoints.output import Output, TargetOptions, data_of
from lavish.checkpoints.protobuf import encode_bytes, encode_number, encode_start, encode_varint
from lavish.checkpoints.tensor_map import Assembled, TensorMap
from lavish.common.errors import CheckpointError, MissingKeys, UnknownLayout, UnsafeCheckpoint

FIXTURE = Path(__file__).parents[1] / "fixtures" / "mindspore_ckpt" / "open"
FILES = FIXTURE / "checkpoint" / "ms"
CARDS = FIXTURE / "checkpoint" / "ms_2cards"


def value(tag: str, dims: tuple[int, ...], kind: str, content: bytes, *, packed: bool = False) -> bytes:
    """One Value as MindSpore writes it."""
    numbers = b"".join(encode_varint(size) for size in dims)
    shape = encode_bytes(1, numbers) if packed else b"".join(encode_number(1, size) for size in dims)
    tensor = shape + encode_bytes(2, kind.encode()) + encode_bytes(3, content)
    return encode_bytes(1, encode_bytes(1, tag.encode()) + encode_bytes(2, tensor))


def written(tmp_path: Path, *values: bytes, name: str = "x.ckpt") -> Path:
    (tmp_path / name).write_bytes(b"".join(values))
    return tmp_path / name


def encode(outputs: list[Output], layout: MindSporeFormat | None = None) -> bytes:
    """A whole file, as the driver writes it."""
    layout = layout or MindSporeFormat()
    pieces = [*layout.begin(outputs)]
    for output in outputs:
        pieces += [bytes(piece) for piece in layout.tensor(output, data_of(output.make()), 0)]
    return b"".join([*pieces, *layout.end(0)])


def outputs_of(tensors: TensorMap) -> list[Output]:
    return [TargetOptions().take(name, tensors, info, (name,)) for name, info in tensors.infos.items()]


def output(name: str, tensor: torch.Tensor) -> Output:
    return Output(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


def assert_equal(found: TensorMap, expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


# -- the fixtures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_converted_model_bit_by_bit(dtype: str) -> None:
    tensors = mindspore.read(FILES / f"cogvlm2-image_{dtype}.ckpt")
    assert_equal(tensors, load_file(FIXTURE / f"expected_{dtype}.safetensors"))
    assert len(tensors) == 68


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("dtypes.ckpt", "dtypes/"),
        ("crc.ckpt", "crc/"),
        ("sliced.ckpt", "sliced/"),
        ("ms_format.safetensors", "dtypes/"),
    ],
)
def test_dtypes_scalars_slices_and_the_safetensors_variant(file: str, prefix: str) -> None:
    expected = load_file(FIXTURE / "expected_variants.safetensors")
    tensors = mindspore.read(FILES / file)
    wanted = {name.removeprefix(prefix): tensor for name, tensor in expected.items() if name.startswith(prefix)}
    if file.endswith(".safetensors"):  # MindSpore cannot save bf16 so, and this file has no counters
        wanted = {name: wanted[name] for name in wanted if name not in ("bf16", "epoch_num", "step_num")}
        wanted = {name: wanted[name] for name in wanted if name not in ("learning_rate", "flag")}
    assert_equal(tensors, wanted)


def test_extra_entries_are_plain_tensors_and_texts_stand_apart() -> None:
    contents = mindspore.read_contents(FILES / "dtypes.ckpt")
    assert contents.texts == {"note": "中文 abc"}
    tensors = mindspore.read(FILES / "dtypes.ckpt")
    assert (tensors["epoch_num"].item(), tensors["step_num"].item(), tensors["flag"].item()) == (2, 17, True)
    assert "note" not in tensors


def test_slices_are_parts_of_one_tensor() -> None:
    infos = mindspore.read(FILES / "sliced.ckpt").infos
    assert isinstance(infos["big"], Assembled)
    assert len(infos["big"].pieces) == 9
    assert len(infos["after.bf16"].pieces) == 3


def test_a_flipped_bit_is_found_by_the_crc(tmp_path: Path) -> None:
    whole = (FILES / "crc.ckpt").read_bytes()
    assert mindspore.read_contents(FILES / "crc.ckpt").has_crc
    for position in (40, len(whole) - 19, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        file = written(tmp_path, bytes(damaged))
        with pytest.raises(CheckpointError, match="its CRC is 0x"):
            mindspore.read(file)
    damaged = bytearray(whole)
    damaged[len(whole) - 19] ^= 4  # a weight's: not looked at where nobody asks
    assert len(mindspore.read(written(tmp_path, bytes(damaged)), verify=False)) == 11


def test_the_crc_of_the_safetensors_variant(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0), "a": torch.tensor([1, 2, 3])}
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), crc))
    file = tmp_path / "x.safetensors"
    save_file(tensors, file, metadata={"format": "ms", "crc_num": str(crc)})
    assert_equal(mindspore.read(file), tensors)
    save_file(tensors, file, metadata={"format": "ms", "crc_num": str(crc ^ 1)})
    with pytest.raises(CheckpointError, match="damaged: its CRC"):
        mindspore.read(file)
    save_file(tensors, file, metadata={"format": "ms", "crc_num": "-1"})
    with pytest.raises(CheckpointError, match="no number"):
        mindspore.read(file)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnknownLayout, match="MindSpore did not write it"):
        mindspore.read(file)


def test_an_encrypted_file_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"encrypted by MindSpore \(AES-GCM\).*dec_key"):
        mindspore.read(FILES / "encrypted.ckpt")
    for first, mode in ((0xD9, "AES-CBC"), (0xDA, "SM4-CBC")):
        with pytest.raises(CheckpointError, match=mode):
            mindspore.read(written(tmp_path, bytes([first, 0x5E, 0x3A, 0x7F]) + bytes(40)))


# -- the wire format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [name for name in TYPES if name != "Int4"])
@pytest.mark.parametrize("packed", [False, True])
def test_each_dtype_and_both_forms_of_dims(tmp_path: Path, kind: str, packed: bool) -> None:
    dtype = getattr(torch, TYPES[kind])
    raw = bytes([1, 0] * 24) if kind == "Bool" else bytes(range(1, 49))
    expected = torch.frombuffer(bytearray(raw), dtype=dtype)
    shape = (3, len(expected) // 3)
    tensors = mindspore.read(written(tmp_path, value("a.b", shape, kind, raw, packed=packed)))
    assert tensors.meta("a.b") == (shape, dtype)
    assert tensors["a.b"].view(torch.uint8).flatten().tolist() == list(raw)


def test_int4_stays_packed(tmp_path: Path) -> None:
    tensors = mindspore.read(written(tmp_path, value("q", (2, 3), "Int4", bytes(range(6)))))
    assert tensors["q"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert tensors["q"].dtype == torch.uint8


def test_scalars_have_no_dims_or_in_old_files_one_of_zero(tmp_path: Path) -> None:
    content = struct.pack("<f", 3.25)
    file = written(tmp_path, value("new", (), "Float32", content), value("old", (0,), "Float32", content))
    tensors = mindspore.read(file)
    for name in ("new", "old"):
        assert tensors[name].shape == ()
        assert tensors[name].item() == 3.25


def test_tensors_without_elements_keep_their_shape(tmp_path: Path) -> None:
    tensors = mindspore.read(written(tmp_path, value("a", (0,), "Float32", b""), value("b", (3, 0), "Int8", b"")))
    assert [tuple(tensors[name].shape) for name in ("a", "b")] == [(0,), (3, 0)]


def test_slices_need_not_be_of_equal_length(tmp_path: Path) -> None:
    raw = torch.arange(35, dtype=torch.int16)
    cut = [raw[:3], raw[3:20], raw[20:20], raw[20:]]
    slices = [value("a", (5, 7), "Int16", part.numpy().tobytes()) for part in cut]
    tensors = mindspore.read(written(tmp_path, *slices, value("b", (1,), "Int8", b"\x05")))
    assert torch.equal(tensors["a"], raw.view(5, 7))
    assert tensors["b"].item() == 5


def test_unknown_fields_are_skipped(tmp_path: Path) -> None:
    more = encode_number(9, 300) + encode_bytes(10, b"skip") + b"\x59" + bytes(8) + b"\x65" + bytes(4)
    tensor = more + encode_number(1, 2) + encode_bytes(2, b"Int8") + encode_bytes(3, b"\x01\x02") + more
    inside = encode_bytes(1, b"a") + more + encode_bytes(2, tensor)
    file = written(tmp_path, encode_bytes(1, inside), more, value("b", (1,), "Int8", b"\x03"))
    tensors = mindspore.read(file)
    assert tensors["a"].tolist() == [1, 2]
    assert tensors["b"].tolist() == [3]


def test_a_hash_table_becomes_its_three_tensors(tmp_path: Path) -> None:
    def table(keys: list[int]) -> bytes:
        parts = [
            (torch.tensor(keys, dtype=torch.int32), "int32"),
            (torch.tensor([[key, -key] for key in keys], dtype=torch.float32), "float32"),
            (torch.ones(len(keys), dtype=torch.int32), "int32"),
        ]
        content = b""
        for tensor, kind in parts:
            dims = b"".join(encode_number(1, size) for size in tensor.shape)
            content += encode_bytes(
                1, dims + encode_bytes(2, kind.encode()) + encode_bytes(3, tensor.numpy().tobytes())
            )
        return encode_bytes(1, encode_bytes(1, b"emb") + encode_bytes(3, content))

    tensors = mindspore.read(written(tmp_path, table([1, 2, 3]), table([4, 5])))
    assert tensors["emb.keys"].tolist() == [1, 2, 3, 4, 5]
    assert tensors["emb.values"].tolist() == [[key, -key] for key in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert tensors["emb.status"].tolist() == [1] * 5


def test_an_unaligned_tensor_is_a_copy_whose_bytes_are_right(tmp_path: Path) -> None:
    numbers = torch.randn(1000, dtype=torch.float64)
    for tag in ("a", "ab", "abc", "abcd"):
        file = written(tmp_path, value(tag, (10, 100), "Float64", numbers.numpy().tobytes()))
        tensor = mindspore.read(file)[tag]
        assert torch.equal(tensor.flatten(), numbers)
        assert tensor.data_ptr() % 8 == 0


TENSOR = encode_number(1, 2) + encode_bytes(2, b"Int8") + encode_bytes(3, b"\x01\x02")
NAME = encode_bytes(1, b"a")
GOOD = value("a", (2,), "Int8", b"\x01\x02")
BROKEN = {
    "length of 4 GB": encode_start(1, 1 << 32) + NAME,
    "length of 2**63": encode_start(1, 1 << 63) + NAME,
    "inner length of 4 GB": encode_bytes(1, NAME + encode_start(2, 1 << 32) + b"x"),
    "content longer than its tensor": encode_bytes(1, NAME + encode_bytes(2, encode_start(3, 900) + b"x")),
    "number that never ends": b"\x0a" + b"\xff" * 40,
    "field of number 0": encode_bytes(1, NAME)[:1] + b"\x02\x00\x00",
    "group": encode_bytes(1, NAME + b"\x1b\x1c"),
    "no name": encode_bytes(1, encode_bytes(2, TENSOR)),
    "no tensor": encode_bytes(1, NAME),
    "two tensors": encode_bytes(1, NAME + encode_bytes(2, TENSOR) * 2),
    "four tensors in a table": encode_bytes(1, NAME + encode_bytes(3, encode_bytes(1, TENSOR) * 4)),
    "name that is no text": encode_bytes(1, encode_bytes(1, b"\xff\xfe") + encode_bytes(2, TENSOR)),
    "name of a megabyte": encode_bytes(1, encode_bytes(1, b"a" * (1 << 20)) + encode_bytes(2, TENSOR)),
    "unknown type": value("a", (2,), "Complex64", bytes(16)),
    "numpy's name outside of a table": value("a", (2,), "float32", bytes(8)),
    "no type": encode_bytes(1, NAME + encode_bytes(2, encode_number(1, 1) + encode_bytes(3, b"x"))),
    "bytes missing": value("a", (3, 5), "Float32", bytes(59)),
    "bytes too many": value("a", (3, 5), "Float32", bytes(64)),
    "negative size": value("a", (-1,), "Int8", b"\x01"),
    "size of 2**62": value("a", (1 << 62, 1 << 62), "Int8", b"\x01"),
    "empty, with axes too long": value("a", (0, 1 << 62, 1 << 62), "Int8", b""),
    "65 dimensions": value("a", (1,) * 65, "Int8", b"\x01"),
    "a million packed dimensions": value("a", (1,) * 1_000_000, "Int8", b"\x01", packed=True),
    "twice": GOOD + value("b", (2,), "Int8", b"\x01\x02") + GOOD,
    "twice in a row": GOOD + GOOD,
    "slices of two shapes": GOOD + value("a", (3,), "Int8", b"\x01"),
    "slices of two types": GOOD + value("a", (2,), "Bool", b"\x01\x01"),
    "slice that cuts an element": value("a", (2,), "Int16", b"\x01") + value("a", (2,), "Int16", b"\x01\x02\x03"),
    "text that is no UTF-32": value("a", (0,), "str", b"\xff\xff\xff\xff"),
    "text of three bytes": value("a", (0,), "str", b"abc"),
    "text and tensor of one name": value("a", (0,), "str", b"a\0\0\0") + value("b", (1,), "Int8", b"1") + GOOD,
    "table of scalars": encode_bytes(1, NAME + encode_bytes(3, encode_bytes(1, encode_bytes(2, b"int8")))) * 2,
    "zeros": b"\x0a" + bytes(100_000),
    "a million empty fields": GOOD + b"\x7a\x00" * 1_000_000,
    "dims that are no numbers": encode_bytes(1, NAME + encode_bytes(2, b"\x0d" + bytes(4) + TENSOR)),
}


@pytest.mark.parametrize("case", BROKEN)
def test_damaged_and_crafted_files_raise_a_typed_error_at_once(tmp_path: Path, case: str) -> None:
    file = written(tmp_path, BROKEN[case])
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        mindspore.read(file)
    assert time.monotonic() - started < 5


def test_a_file_cut_anywhere_is_refused_and_says_where(tmp_path: Path) -> None:
    whole = (FILES / "dtypes.ckpt").read_bytes()
    ends = {len(whole)}
    position = 0
    while position < len(whole):  # values of up to 127 bytes
        position += 2 + whole[position + 1]
        ends.add(position)
    for length in range(1, len(whole)):
        file = written(tmp_path, whole[:length])
        if length in ends:
            mindspore.read(file)  # a cut between two parameters cannot be seen without a CRC
            continue
        with pytest.raises(CheckpointError):
            mindspore.read(file)
    with pytest.raises(CheckpointError, match=r"truncated: 'f32' ends at byte 84 and the file has 60"):
        mindspore.read(written(tmp_path, whole[:60]))


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_only_typed_errors_come_of_mutated_files(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray((FILES / data.draw(st.sampled_from(["dtypes.ckpt", "sliced.ckpt", "crc.ckpt"]))).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(content) - 1))
        content[start : start + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    file = written(tmp_path, bytes(content))
    try:
        tensors = mindspore.read(file, verify=False)
        for name in tensors:
            _ = tensors[name]
    except CheckpointError:
        pass


# -- which file is meant -----------------------------------------------------------------------------------------------


def test_what_is_no_checkpoint_of_mindspore_is_described(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}}, tmp_path / "lightning.ckpt")
    with pytest.raises(UnknownLayout, match=r"rename it to \.pth"):
        mindspore.read(tmp_path / "lightning.ckpt")
    with pytest.raises(UnknownLayout, match="empty"):
        mindspore.read(written(tmp_path))
    with pytest.raises(UnknownLayout, match="a strategy"):
        mindspore.read(CARDS / "strategy" / "ckpt_strategy_rank_0.ckpt")
    with pytest.raises(UnknownLayout, match="no such file or folder"):
        mindspore.read(tmp_path / "absent")
    assert not mindspore.is_mindspore(tmp_path / "lightning.ckpt")
    assert mindspore.is_mindspore(FILES / "encrypted.ckpt")


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    with pytest.raises(UnknownLayout, match="found nothing"):
        mindspore.read(tmp_path)
    shutil.copy(FILES / "dtypes.ckpt", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"{")
    assert len(mindspore.read(tmp_path)) == 15
    shutil.copy(FILES / "sliced.ckpt", tmp_path)
    with pytest.raises(UnknownLayout, match=r"holds 2 checkpoints, dtypes\.ckpt, sliced\.ckpt"):
        mindspore.read(tmp_path)


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cards(tmp_path: Path) -> Path:
    shutil.copytree(CARDS, tmp_path / "run")
    return tmp_path / "run"


def test_two_cards_merged_are_the_whole(cards: Path) -> None:
    expected = load_file(FIXTURE / "expected_fp16.safetensors")
    tensors = mindspore.read(cards)
    assert_equal(tensors, expected)
    assert sum(isinstance(info, Assembled) for info in tensors.infos.values()) == 2 + 2 * (2 * 2 + 1)


@pytest.mark.parametrize("place", ["run/strategy", "strategy", "run"])
def test_the_strategy_stands_in_the_folder_or_beside_it(cards: Path, place: str) -> None:
    target = cards.parent / place
    if place != "run/strategy":
        target.mkdir(exist_ok=True)
        for file in (cards / "strategy").iterdir():
            shutil.move(file, target / file.name)
        (cards / "strategy").rmdir()
    assert_equal(mindspore.read(cards), load_file(FIXTURE / "expected_fp16.safetensors"))


def test_ranks_without_a_strategy(cards: Path) -> None:
    shutil.rmtree(cards / "strategy")
    with pytest.raises(MissingKeys, match=r"no strategy says .* Copy the run's folder 'strategy' there"):
        mindspore.read(cards)
    shutil.rmtree(cards / "rank_1")
    assert len(mindspore.read(cards)) == 68  # a run on one device writes none


def test_a_missing_rank_is_named(cards: Path) -> None:
    shutil.rmtree(cards / "rank_0")
    with pytest.raises(MissingKeys, match=r"of 2 processes, and 1 have no checkpoint here: rank_0"):
        mindspore.read(cards)
    shutil.copytree(cards / "rank_1", cards / "rank_0")
    shutil.copytree(cards / "rank_1", cards / "rank_2")
    with pytest.raises(CheckpointError, match="holds 3 ranks, and its strategy is of 2 processes"):
        mindspore.read(cards)


def test_one_rank_of_several_is_a_part(cards: Path) -> None:
    for path in (cards / "rank_1", cards / "rank_1" / "checkpoint_1.ckpt"):
        with pytest.raises(UnknownLayout, match=r"one of the 2 ranks of a run, which hold parts; give their folder"):
            mindspore.read(path)


def test_two_checkpoints_of_a_rank_are_not_chosen_among(cards: Path) -> None:
    shutil.copy(cards / "rank_0" / "checkpoint_0.ckpt", cards / "rank_0" / "earlier.ckpt")
    with pytest.raises(UnknownLayout, match="holds 2 checkpoints"):
        mindspore.read(cards)


def rank(folder: Path, number: int, **tensors: torch.Tensor) -> None:
    (folder / f"rank_{number}").mkdir(parents=True)
    content = encode([output(name, tensor) for name, tensor in tensors.items()])
    (folder / f"rank_{number}" / "net.ckpt").write_bytes(content)


def strategy(folder: Path, **layouts: Layout) -> None:
    (folder / "strategy").mkdir(exist_ok=True)
    (folder / "strategy" / "ckpt_strategy_rank_0.ckpt").write_bytes(encode_strategy(layouts))


def test_what_ranks_hold_whole_must_be_equal(tmp_path: Path) -> None:
    weights = torch.randn(4, 6)
    for number in range(2):
        rank(tmp_path, number, a=weights[:, 3 * number : 3 * number + 3], b=torch.ones(3_000_000) + number)
    strategy(tmp_path, a=Layout((2,), (-1, 0)), b=Layout((2,), (-1,)))
    with pytest.raises(CheckpointError, match=r"'b' is whole in several ranks, and rank_1 holds another value"):
        mindspore.read(tmp_path)
    assert torch.equal(mindspore.read(tmp_path, verify=False)["a"], weights)


def test_ranks_of_different_steps_are_found_even_where_nobody_asks(tmp_path: Path) -> None:
    for number in range(2):
        rank(tmp_path, number, a=torch.ones(2, 3), step_num=torch.tensor(100 + number))
    strategy(tmp_path, a=Layout((2,), (0, -1)))
    with pytest.raises(CheckpointError, match="different steps"):
        mindspore.read(tmp_path, verify=False)


def test_a_matrix_of_devices_cuts_two_axes_and_repeats(tmp_path: Path) -> None:
    """dev_matrix (2, 3, 2): rows over the first axis, columns over the second, the third only repeats."""
    weights = torch.randn(8, 9)
    for number in range(12):
        row, column = number // 6, number // 2 % 3
        rank(tmp_path, number, a=weights[4 * row : 4 * row + 4, 3 * column : 3 * column + 3])
    strategy(tmp_path, a=Layout((2, 3, 2), (2, 1)))
    assert torch.equal(mindspore.read(tmp_path)["a"], weights)


def test_slices_inside_of_ranks(tmp_path: Path) -> None:
    weights = torch.randn(6, 10)
    for number in range(2):
        (tmp_path / f"rank_{number}").mkdir()
        part = output("a", weights[:, 5 * number : 5 * number + 5].contiguous())
        content = encode([part], MindSporeFormat(slice_bytes=28))
        (tmp_path / f"rank_{number}" / "x.ckpt").write_bytes(content)
    strategy(tmp_path, a=Layout((2,), (-1, 0)))
    assert torch.equal(mindspore.read(tmp_path)["a"], weights)


@pytest.mark.parametrize(
    ("first", "second", "match"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(3)}, "of different runs"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2, dtype=torch.float16)}, "of different runs"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, {"a": torch.ones(2)}, "not in all ranks"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(1)}, "rank_1 holds 'b'"),
        ({"a": torch.ones(2, 2)}, {"a": torch.ones(2, 2)}, "has 1 axes for 'a'"),
    ],
)
def test_ranks_that_do_not_belong_together(tmp_path: Path, first: dict, second: dict, match: str) -> None:
    rank(tmp_path, 0, **first)
    rank(tmp_path, 1, **second)
    strategy(tmp_path, a=Layout((2,), (0,)))
    with pytest.raises(CheckpointError, match=match):
        mindspore.read(tmp_path)


def layout_item(name: str = "0-a", matrix: tuple = (2,), axes: tuple = (0,), more: bytes = b"") -> bytes:
    parts = encode_bytes(1, b"".join(encode_number(1, size) for size in matrix))
    parts += encode_bytes(2, b"".join(encode_number(1, axis) for axis in axes)) + more
    return encode_number(1, 0) + encode_bytes(3, encode_bytes(1, name.encode()) + encode_bytes(2, parts))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            layout_item(more=encode_number(6, 1) + encode_number(7, 2)),
            r"sharded with the optimizer.*transform_checkpoi",
        ),
        (layout_item(more=encode_number(7, -1)), "sharded with the optimizer"),
        (layout_item(more=encode_number(5, 8)), "cut by fields"),
        (layout_item(more=encode_bytes(3, encode_number(1, 3) + encode_number(1, 4))), "uneven parts"),
        (layout_item(name="1-a"), "'a' is of pipeline stage 1"),
        (encode_number(1, 3), "of pipeline stage 3"),
        (layout_item(name="a"), "not <stage>-<name>"),
        (layout_item(matrix=()), "cut over processes"),
        (layout_item(matrix=(0,)), "cut over processes"),
        (layout_item(matrix=(1 << 40,)), "cut over processes"),
        (layout_item(axes=(1,)), r"tensor map \[1\]"),
        (layout_item(axes=(-2,)), r"tensor map \[-2\]"),
        (layout_item(more=encode_bytes(2, encode_number(1, 0))), "several groups"),
        (layout_item() + layout_item(name="0-b", matrix=(4,)), "of 2 and 4 processes"),
        (encode_number(1, 0), "of no processes"),
        (b"\x08\x00\x1a\xff\xff\xff\xff\x0f", "damaged"),
        (encode_number(1, 0) + encode_bytes(3, b""), "without a name"),
    ],
)
def test_strategies_that_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    rank(tmp_path, 0, a=torch.ones(2))
    rank(tmp_path, 1, a=torch.ones(2))
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy" / "x.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        mindspore.read(tmp_path)


def test_strategies_that_contradict_each_other(cards: Path) -> None:
    content = encode_strategy({"llm_model.lm_head.weight": Layout((2,), (-1, 0))})
    (cards / "strategy" / "ckpt_strategy_rank_1.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cuts 'llm_model\.lm_head\.weight' by"):
        mindspore.read(cards)


def test_a_link_out_of_the_folder_is_not_followed(cards: Path, tmp_path: Path) -> None:
    file = cards / "rank_1" / "checkpoint_1.ckpt"
    shutil.move(file, tmp_path / "elsewhere.ckpt")
    file.symlink_to(tmp_path / "elsewhere.ckpt")
    with pytest.raises(UnsafeCheckpoint, match="outside of the folder"):
        mindspore.read(cards)


# -- writing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_file_written_again_is_the_same_file(dtype: str) -> None:
    file = FILES / f"cogvlm2-image_{dtype}.ckpt"
    assert encode(outputs_of(mindspore.read(file))) == file.read_bytes()


@pytest.mark.parametrize("name", ["dtypes.ckpt", "crc.ckpt", "sliced.ckpt", "ms_format.safetensors"])
@pytest.mark.parametrize("slice_bytes", [1 << 29, 100, 1])
def test_what_is_written_reads_back_equal(tmp_path: Path, name: str, slice_bytes: int) -> None:
    tensors = mindspore.read(FILES / name)
    content = encode(outputs_of(tensors), MindSporeFormat(has_crc=True, slice_bytes=slice_bytes))
    assert_equal(mindspore.read(written(tmp_path, content)), {name: tensors[name] for name in tensors})


def test_the_crc_is_mindspores() -> None:
    tensors = mindspore.read(FILES / "crc.ckpt")
    assert encode(outputs_of(tensors), MindSporeFormat(has_crc=True)) == (FILES / "crc.ckpt").read_bytes()


def test_a_resumed_file_has_the_crc_of_the_whole() -> None:
    outputs = outputs_of(mindspore.read(FILES / "crc.ckpt"))
    first = MindSporeFormat(has_crc=True)
    pieces = [bytes(piece) for one in outputs[:4] for piece in first.tensor(one, data_of(one.make()), 0)]
    second = MindSporeFormat(has_crc=True)
    second.restore(first.state())
    pieces += [bytes(piece) for one in outputs[4:] for piece in second.tensor(one, data_of(one.make()), 0)]
    assert b"".join([*pieces, *second.end(0)]) == (FILES / "crc.ckpt").read_bytes()


def test_what_mindspore_cannot_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'a' is float8_e5m2, which MindSpore does not have"):
        encode([output("a", torch.ones(2).to(torch.float8_e5m2))])
    with pytest.raises(CheckpointError, match="'a' has no elements"):
        encode([output("a", torch.ones(0, 3))])


def test_strategies_are_written_as_mindspore_writes_them() -> None:
    whole = (CARDS / "strategy" / "ckpt_strategy_rank_0.ckpt").read_bytes()
    operators = encode_bytes(2, encode_bytes(1, b"0-x") + encode_bytes(2, encode_number(1, 0)))
    assert operators in whole  # how operators are cut, which no checkpoint needs
    assert encode_strategy(mindspore.read_strategy(CARDS)) == whole.replace(operators, b"")


def test_reading_a_file_of_many_gigabytes_takes_no_memory_and_no_time(tmp_path: Path) -> None:
    """A sparse file of the shape of a 39 GB model: only the headers are on the disk."""
    file = tmp_path / "large.ckpt"
    each = 40 << 20
    with file.open("wb") as handle:
        for layer in range(1000):
            tensor = encode_number(1, each // 2) + encode_bytes(2, b"BFloat16") + encode_start(3, each)
            inside = encode_bytes(1, f"layer.{layer}".encode()) + encode_start(2, len(tensor) + each) + tensor
            handle.write(encode_start(1, len(inside) + each) + inside)
            handle.seek(each, os.SEEK_CUR)
        handle.truncate()
    assert file.stat().st_size > 39e9
    started = time.monotonic()
    contents = read_file(file)
    assert time.monotonic() - started < 1
    assert len(contents.infos) == 1000
