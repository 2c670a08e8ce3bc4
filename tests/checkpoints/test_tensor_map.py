"""A tensor that several stored parts make: covered once, cut, reshaped, loaded."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lavish.checkpoints import hf
from lavish.checkpoints.loading import Cut, load_into
from lavish.checkpoints.rules import Merge, Rename, Split
from lavish.checkpoints.tensor_map import Assembled, Piece, TensorInfo, TensorMap, reshaped, view
from lavish.common.errors import CheckpointError

WHOLE = torch.arange(8 * 6, dtype=torch.float32).view(8, 6)


@pytest.fixture
def stored(tmp_path):
    """Three ways in which WHOLE lies in files: whole, as columns of two ranks, as ranges of its flattened elements."""
    save_file({"whole": WHOLE}, tmp_path / "0.safetensors")
    for rank in range(2):
        save_file({"columns": WHOLE[:, 3 * rank : 3 * rank + 3].clone()}, tmp_path / f"c{rank}.safetensors")
    flat = WHOLE.reshape(-1)
    for rank, (start, stop) in enumerate([(0, 17), (17, 20), (20, 48)]):
        save_file({"flat": flat[start:stop].clone()}, tmp_path / f"f{rank}.safetensors")
    infos = dict(hf.read(tmp_path / "0.safetensors").infos)
    parts = [hf.read(tmp_path / f"c{rank}.safetensors").infos["columns"] for rank in range(2)]
    infos["columns"] = Assembled((8, 6), "float32", (Piece(parts[0], (0, 0)), Piece(parts[1], (0, 3))))
    ranges = [hf.read(tmp_path / f"f{rank}.safetensors").infos["flat"] for rank in range(3)]
    infos["flat"] = Assembled(
        (8, 6), "float32", tuple(Piece(info, (start,)) for info, start in zip(ranges, (0, 17, 20))), is_flat=True
    )
    return TensorMap(tmp_path, infos)


@pytest.mark.parametrize("name", ["whole", "columns", "flat"])
def test_a_tensor_in_parts_is_taken_whole(stored, name):
    assert torch.equal(stored[name], WHOLE)
    assert stored.meta(name) == ((8, 6), torch.float32)
    assert stored.info(name).nbytes == 192


@pytest.mark.parametrize("name", ["whole", "columns", "flat"])
@pytest.mark.parametrize(("dim", "start", "stop"), [(0, 2, 5), (1, 1, 4), (0, 0, 8), (1, 3, 6), (1, 2, 2)])
def test_a_range_of_it_is_a_view(stored, name, dim, start, stop):
    part = view(stored.info(name), dim, start, stop)
    assert type(part) is type(stored.info(name))
    assert torch.equal(stored.assemble(part), WHOLE.narrow(dim, start, stop - start))


def test_a_range_of_a_range_is_a_view(stored):
    for name in stored:
        part = view(view(view(stored.info(name), 1, 1, 5), 0, 1, 7), 1, 1, 3)
        assert torch.equal(stored.assemble(part), WHOLE[1:7, 2:4])


def test_a_range_beyond_it_is_refused(stored):
    for dim, start, stop in [(0, 0, 9), (2, 0, 1), (1, 4, 3), (0, -1, 2)]:
        with pytest.raises(CheckpointError, match="has no"):
            view(stored.info("columns"), dim, start, stop)


@pytest.mark.parametrize("name", ["whole", "columns", "flat"])
def test_sizes_of_one_come_and_go(stored, name):
    longer = reshaped(stored.info(name), (1, 8, 1, 6))
    assert torch.equal(stored.assemble(longer), WHOLE.view(1, 8, 1, 6))
    assert torch.equal(stored.assemble(reshaped(longer, (8, 6))), WHOLE)


def test_another_shape_needs_what_lies_in_one_piece(stored):
    for name in ("whole", "flat"):
        assert torch.equal(stored.assemble(reshaped(stored.info(name), (4, 12))), WHOLE.view(4, 12))
    assert torch.equal(stored.assemble(reshaped(view(stored.info("whole"), 1, 0, 3), (8, 1, 3))), WHOLE[:, None, :3])
    for info in (stored.info("columns"), view(stored.info("whole"), 1, 0, 3)):
        with pytest.raises(CheckpointError, match="cannot have the shape"):
            reshaped(info, (4, info.numel // 4))
    with pytest.raises(CheckpointError, match="cannot have the shape"):
        reshaped(stored.info("whole"), (7, 7))


def _piece(tmp_path, shape, start, dtype="float32"):
    return Piece(TensorInfo(shape, dtype, tmp_path / "x", 0), start)


def test_parts_must_cover_every_element_once(tmp_path):
    half, corner = _piece(tmp_path, (2, 2), (0, 0)), _piece(tmp_path, (2, 2), (0, 1))
    for pieces in [(half,), (half, half), (half, corner), ()]:
        with pytest.raises(CheckpointError, match="once each"):
            Assembled((2, 4), "float32", pieces)
    with pytest.raises(CheckpointError, match="does not lie in"):
        Assembled((2, 4), "float32", (half, _piece(tmp_path, (2, 2), (0, 3))))
    with pytest.raises(CheckpointError, match="does not lie in"):
        Assembled((2, 4), "float32", (half, _piece(tmp_path, (4,), (4,))))
    with pytest.raises(CheckpointError, match="is bfloat16"):
        Assembled((2, 4), "float32", (half, _piece(tmp_path, (2, 2), (0, 2), "bfloat16")))


def test_overlapping_ranges_are_found(tmp_path):
    with pytest.raises(CheckpointError, match="once each"):
        Assembled((9,), "float32", tuple(_piece(tmp_path, (3,), (start,)) for start in (0, 2, 6)), is_flat=True)


def test_odd_ranks_and_dtypes(tmp_path):
    tensors = {
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "bool": torch.tensor([True, False, True]),
        "deep": torch.arange(2 * 3 * 5 * 7, dtype=torch.int64).view(2, 3, 5, 7),
    }
    save_file(tensors, tmp_path / "t.safetensors")
    stored = hf.read(tmp_path / "t.safetensors")
    for name, info in stored.infos.items():
        start = (0,) * len(info.shape)
        assert torch.equal(stored.assemble(Assembled(info.shape, info.dtype, (Piece(info, start),))), tensors[name])
    deep = reshaped(stored.info("deep"), (210,))
    pieces = tuple(Piece(view(deep, 0, first, min(first + 31, 210)), (first,)) for first in range(0, 210, 31))
    flat = Assembled((2, 3, 5, 7), "int64", pieces, is_flat=True)
    assert torch.equal(stored.assemble(flat), tensors["deep"])
    assert torch.equal(stored.assemble(flat.boxed()), tensors["deep"])
    assert torch.equal(stored.assemble(view(flat, 2, 1, 4)), tensors["deep"][:, :, 1:4])


class _Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.joined = nn.Linear(6, 16, bias=False)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load_into_takes_parts_through_rules_and_cuts(stored, dtype):
    with torch.device("meta"):
        network = _Two()
    infos = {"fused": stored.infos["flat"], "one": stored.infos["columns"], "two": stored.infos["whole"]}
    rules = [Split("fused", ("a.weight", "b.weight")), Merge(("one", "two"), "joined.weight")]
    load_into(network, TensorMap(stored.path, infos), dtype=dtype, device="cpu", rules=rules)
    assert torch.equal(network.a.weight, WHOLE[:4].to(dtype or torch.float32))
    assert torch.equal(network.b.weight, WHOLE[4:].to(dtype or torch.float32))
    assert torch.equal(network.joined.weight, torch.cat([WHOLE, WHOLE]).to(dtype or torch.float32))


def test_one_process_of_several_takes_its_part(stored):
    with torch.device("meta"):
        network = nn.Linear(2, 8, bias=False)
    cut = Cut(1, ((1, 2), (4, 5)), (8, 6))
    for name in stored:
        alone = TensorMap(stored.path, {name: stored.infos[name]})
        load_into(network, alone, dtype=None, device="cpu", rules=[Rename(name, "weight")], cuts={"weight": cut})
        assert torch.equal(network.weight, WHOLE[:, [1, 4]])
