"""Streaming a checkpoint into a network on the meta device: strict, tied, cast as the release casts."""

from pathlib import Path

import pytest
import torch
from torch import nn

from lavish.checkpoints import hf
from lavish.checkpoints.loading import Cut, rearrange
from lavish.checkpoints.rules import Drop, Merge, Optional, Rename, Rule, Split, reverse
from lavish.checkpoints.writer import save_sharded
from lavish.common.errors import CheckpointError, MissingKeys, ShapeMismatch, UnexpectedKeys


class Net(nn.Module):
    """What loading meets: parameters, a stored and a computed buffer, an integer, tied and frozen weights."""

    inv_freq: torch.Tensor
    computed: torch.Tensor
    steps: torch.Tensor

    def __init__(self, tie: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 5, bias=False)
        self.register_buffer("inv_freq", torch.tensor([1.0, 0.1]))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("computed", torch.ones(2), persistent=False)
        self.norm.requires_grad_(False)
        if tie:
            self.lm_head.weight = self.embed.weight


@pytest.fixture
def stored() -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in Net().state_dict().items()}


def on_meta(tie: bool = True) -> Net:
    with torch.device("meta"):
        return Net(tie)


def read(folder: Path, tensors: dict[str, torch.Tensor], max_shard_bytes: int = 100):
    save_sharded(tensors, folder, max_shard_bytes)
    return hf.read(folder)


def test_every_tensor_arrives(tmp_path: Path, stored: dict) -> None:
    net = on_meta()
    left = hf.load_into(net, read(tmp_path, stored), dtype=None, device="cpu")
    assert left == ["computed"]
    assert net.state_dict().keys() == stored.keys()
    assert all(torch.equal(value, stored[name]) for name, value in net.state_dict().items())
    assert net.lm_head.weight is net.embed.weight
    assert net.embed.weight.requires_grad
    assert not net.norm.weight.requires_grad
    assert isinstance(net.norm.weight, nn.Parameter)
    assert "inv_freq" in dict(net.named_buffers())


def test_the_cast_is_the_models_cast(tmp_path: Path, stored: dict) -> None:
    """Persistent buffers go with the model (a stored inv_freq is rounded), integers do not, keep_dtype names do not."""
    stored["inv_freq"] = torch.tensor([1.0, 0.1]).bfloat16()
    net = on_meta()
    hf.load_into(net, read(tmp_path, stored), dtype=torch.float32, device="cpu", keep_dtype=["norm.*"])
    assert (net.inv_freq.dtype, net.steps.dtype) == (torch.float32, torch.int64)
    assert net.inv_freq[1].item() == torch.tensor(0.1).bfloat16().item()
    net = on_meta()
    hf.load_into(net, hf.read(tmp_path), dtype=torch.bfloat16, device="cpu", keep_dtype=["norm.*"])
    assert net.norm.bias.dtype == net.norm.weight.dtype == torch.float32
    assert {parameter.dtype for name, parameter in net.named_parameters() if "norm" not in name} == {torch.bfloat16}
    assert torch.equal(net.layers[0].weight, stored["layers.0.weight"].bfloat16())


def test_the_file_may_go_after_loading(tmp_path: Path, stored: dict) -> None:
    net = on_meta()
    tensors = read(tmp_path, stored)
    hf.load_into(net, tensors, dtype=None, device="cpu")
    for file in tensors.files:
        file.write_bytes(b"\0" * file.stat().st_size)
    assert torch.equal(net.layers[1].weight, stored["layers.1.weight"])


def test_loading_to_meta_reads_nothing(tmp_path: Path, stored: dict) -> None:
    net = on_meta()
    assert hf.load_into(net, read(tmp_path, stored), dtype=torch.bfloat16, device="meta") == []
    assert net.layers[2].bias.is_meta
    assert net.layers[2].bias.dtype == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_loading_to_the_gpu(tmp_path: Path, stored: dict) -> None:
    net = on_meta()
    hf.load_into(net, read(tmp_path, stored), dtype=torch.bfloat16, device="cuda")
    assert net.lm_head.weight is net.embed.weight
    assert torch.equal(net.layers[0].weight.cpu(), stored["layers.0.weight"].bfloat16())


@pytest.mark.parametrize("kept", ["embed.weight", "lm_head.weight"])
def test_one_of_two_tied_names_is_enough(tmp_path: Path, stored: dict, kept: str) -> None:
    dropped = {"embed.weight": "lm_head.weight", "lm_head.weight": "embed.weight"}[kept]
    expected = stored[dropped]
    del stored[dropped]
    net = on_meta()
    hf.load_into(net, read(tmp_path, stored), dtype=None, device="cpu")
    assert net.lm_head.weight is net.embed.weight
    assert torch.equal(net.embed.weight, expected)


def test_tied_names_that_differ(tmp_path: Path, stored: dict) -> None:
    stored["lm_head.weight"] = stored["lm_head.weight"] + 1
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' and 'embed\.weight' differ, but this Net ties them"):
        hf.load_into(on_meta(), read(tmp_path, stored), dtype=None, device="cpu")
    hf.load_into(on_meta(tie=False), hf.read(tmp_path), dtype=None, device="cpu")


def test_missing_keys_say_which_shard_to_fetch(tmp_path: Path, stored: dict) -> None:
    tensors = read(tmp_path, stored)
    gone = tensors.info("norm.weight").file
    gone.unlink()
    partial = hf.read(tmp_path, allow_absent=True)
    listed = len(tensors.files)
    with pytest.raises(MissingKeys) as caught:
        hf.load_into(on_meta(), partial, dtype=None, device="cpu")
    said = str(caught.value)
    assert f"of {len(stored)} tensors that this Net needs are absent" in said
    assert f"The index lists {listed} shards and {listed - 1} are on disk; fetch {gone.name}." in said


def test_missing_keys_of_a_whole_checkpoint(tmp_path: Path, stored: dict) -> None:
    del stored["layers.1.bias"]
    net = on_meta()
    with pytest.raises(MissingKeys, match=r"1 of 12 tensors that this Net needs are absent, first 'layers\.1\.bias'"):
        hf.load_into(net, read(tmp_path, stored), dtype=None, device="cpu")
    assert all(parameter.is_meta for parameter in net.parameters())


def test_unexpected_keys_suggest(tmp_path: Path, stored: dict) -> None:
    stored["layers.1.biass"] = torch.ones(4)
    with pytest.raises(UnexpectedKeys) as caught:
        hf.load_into(on_meta(), read(tmp_path, stored), dtype=None, device="cpu")
    assert "1 of 13 tensors have no place in this Net, first 'layers.1.biass' in model-" in str(caught.value)
    assert "Did you mean" in str(caught.value)


def test_a_wrong_shape_shows_both(tmp_path: Path, stored: dict) -> None:
    stored["norm.weight"] = torch.ones(6)
    with pytest.raises(ShapeMismatch, match=r"1 of 12 .* first 'norm\.weight': \(6,\) in .*, \(4,\) by the config"):
        hf.load_into(on_meta(), read(tmp_path, stored), dtype=None, device="cpu")


def test_quantised_weights_are_named_as_such(tmp_path: Path, stored: dict) -> None:
    stored["layers.0.weight"] = torch.ones(4, 4, dtype=torch.int8)
    with pytest.raises(CheckpointError, match=r"'layers\.0\.weight' is stored as int8 .* quantised"):
        hf.load_into(on_meta(), read(tmp_path, stored), dtype=None, device="cpu")


def test_float16_overflow_is_not_silent(tmp_path: Path, stored: dict) -> None:
    stored["layers.0.weight"][0, 0] = 1e6
    with pytest.raises(CheckpointError, match=r"'layers\.0\.weight' is too large for float16 .* load as bfloat16"):
        hf.load_into(on_meta(), read(tmp_path, stored), dtype=torch.float16, device="cpu")
    hf.load_into(on_meta(), hf.read(tmp_path), dtype=torch.bfloat16, device="cpu")


def test_rules_rename_drop_and_excuse(tmp_path: Path, stored: dict) -> None:
    expected = dict(stored)
    renamed = {name.replace("layers.", "transformer.h."): value for name, value in stored.items()}
    del renamed["inv_freq"]
    renamed["transformer.h.0.mask"] = torch.ones(1)
    rules = [
        Drop("transformer.h.*.mask", why="a constant of the code"),
        Rename("transformer.h.*.*", "layers.*.*"),
        Optional("inv_freq", why="one release does not store it"),
    ]
    net = on_meta()
    left = hf.load_into(net, read(tmp_path, renamed), dtype=None, device="cpu", rules=rules)
    assert left == ["inv_freq", "computed"]
    assert net.inv_freq.is_meta
    assert torch.equal(net.layers[2].weight, expected["layers.2.weight"])


def test_pickled_views_arrive_contiguous(tmp_path: Path) -> None:
    weight = torch.arange(20.0).reshape(5, 4)
    torch.save({"weight": weight.t()}, tmp_path / "pytorch_model.bin")
    net = nn.Linear(5, 4, bias=False, device="meta")
    hf.load_into(net, hf.read(tmp_path), dtype=None, device="cpu")
    assert torch.equal(net.weight, weight.t())
    assert net.weight.is_contiguous()


class Attention(nn.Module):
    """What a fused projection is loaded into."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 6) for _ in range(3))


def fused_rules(dim: int = 0, sizes: tuple[int, ...] | None = None) -> list[Rule]:
    return [Split(f"qkv.{leaf}", tuple(f"{name}.{leaf}" for name in "qkv"), dim, sizes) for leaf in ("weight", "bias")]


@pytest.mark.parametrize("layout", ["safetensors", "pickle"])
def test_a_fused_tensor_is_cut_on_the_way(tmp_path: Path, layout: str) -> None:
    with torch.device("meta"):
        net = Attention()
    fused = {"qkv.weight": torch.arange(72.0).reshape(4, 18).t(), "qkv.bias": torch.arange(18.0)}  # a strided pickle
    if layout == "pickle":
        torch.save(fused, tmp_path / "pytorch_model.bin")
    else:
        save_sharded(fused, tmp_path)
    hf.load_into(net, hf.read(tmp_path), dtype=torch.bfloat16, device="cpu", rules=fused_rules())
    assert torch.equal(net.k.weight, fused["qkv.weight"][6:12].bfloat16())
    assert torch.equal(net.v.bias, fused["qkv.bias"][12:].bfloat16())
    assert net.q.weight.is_contiguous()
    back = rearrange(net.state_dict(), reverse(fused_rules()))
    assert {name: value.tolist() for name, value in back.items()} == {
        name: value.bfloat16().tolist() for name, value in fused.items()
    }


def test_parts_of_given_sizes_along_another_dimension(tmp_path: Path) -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(5, 3, bias=False)})
    rules = [Split("ab", ("a.weight", "b.weight"), dim=1, sizes=(2, 5))]
    whole = torch.arange(21.0).reshape(3, 7)
    save_sharded({"ab": whole}, tmp_path)
    hf.load_into(net, hf.read(tmp_path), dtype=None, device="cpu", rules=rules)
    assert torch.equal(net["b"].weight, whole[:, 2:])
    assert torch.equal(rearrange(net.state_dict(), reverse(rules))["ab"], whole)
    cut = {"b.weight": Cut(0, ((1, 3),), (3, 5))}
    with torch.device("meta"):
        share = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False), "b": nn.Linear(5, 2, bias=False)})
    hf.load_into(share, hf.read(tmp_path), dtype=None, device="cpu", rules=rules, cuts=cut)
    assert torch.equal(share["b"].weight, whole[1:, 2:])


def test_a_fused_tensor_of_another_shape(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = Attention()
    save_sharded({"qkv.weight": torch.ones(20, 4), "qkv.bias": torch.ones(18)}, tmp_path)
    with pytest.raises(ShapeMismatch, match=r"'qkv\.weight' is \(20, 4\) in .* 3 parts of equal size along"):
        hf.load_into(net, hf.read(tmp_path), dtype=None, device="cpu", rules=fused_rules())
    save_sharded({"qkv.weight": torch.ones(21, 4), "qkv.bias": torch.ones(18)}, tmp_path)
    with pytest.raises(ShapeMismatch, match=r"first 'qkv\.weight', part 1 of 3: \(7, 4\) in .*, \(6, 4\) by"):
        hf.load_into(net, hf.read(tmp_path), dtype=None, device="cpu", rules=fused_rules())
    save_sharded({"qkv.weight": torch.ones(18, 4)}, tmp_path)
    with pytest.raises(MissingKeys, match=r"3 of 6 tensors .* first 'q\.bias'"):
        hf.load_into(net, hf.read(tmp_path), dtype=None, device="cpu", rules=fused_rules())


def test_stored_parts_are_laid_behind_each_other(tmp_path: Path) -> None:
    rules = [Merge(("q_bias", None, "v_bias"), "bias")]
    tensors = {"q_bias": torch.tensor([1.0, 2.0]), "v_bias": torch.tensor([3.0, 4.0]), "weight": torch.ones(6, 3)}
    net = nn.Linear(3, 6, device="meta")
    hf.load_into(net, read(tmp_path, tensors, max_shard_bytes=8), dtype=None, device="cpu", rules=rules)
    assert net.bias.tolist() == [1, 2, 0, 0, 3, 4]
    assert rearrange(net.state_dict(), reverse(rules)).keys() == tensors.keys()
    tensors["v_bias"] = torch.ones(3)
    with pytest.raises(ShapeMismatch, match=r"'q_bias' and the tensors to lay behind it .* do not fit"):
        hf.load_into(net, read(tmp_path, tensors), dtype=None, device="cpu", rules=rules)
    with pytest.raises(ShapeMismatch, match="do not fit"):
        rearrange(tensors, rules)
