"""Tensor parallelism: several processes give what one gives, each holds a share, and none runs alone unasked."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import LOGITS_APART, close
from warm import run_together

import lavish
from lavish.checkpoints import hf
from lavish.checkpoints.loading import load_into
from lavish.common.errors import ConfigError, ShapeMismatch
from lavish.inference.parallel import cut_network, head_spans, local_device
from lavish.models.cogvlm.weights import TENSOR_PARALLEL_PLAN

PROGRAM = Path(__file__).with_name("tensor_parallel_program.py")


class Run:
    """What the processes of one run wrote down."""

    def __init__(self, release, size: int, folder: Path):
        done = run_together(size, PROGRAM, release.name, folder)
        assert done.returncode == 0, done.stderr
        self.release, self.size = release, size
        self.tensors = [load_file(folder / f"{rank}.safetensors") for rank in range(size)]
        self.told = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        self.expected = load_file(release.folder.parent / "expected.safetensors")


def as_process(monkeypatch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(size))


# -- several processes -------------------------------------------------------------------------------------------------


def logits_and_image_features_are_those_of_one_process(run):
    """Every prompt, with an image and without, and the left-padded batch of both."""
    assert {f"{name}.logits" for name in run.release.prompts} <= run.tensors[0].keys()
    is_real = torch.tensor(run.release.expected["batch_left"]["attention_mask"]).bool()
    for name, found in run.tensors[0].items():
        if name in run.expected:
            rows = is_real if name == "batch_left.logits" else slice(None)
            close(found[rows], run.expected[name][rows])


def greedy_tokens_are_the_released_ones(run):
    ids = dict(run.told[0]["ids"])
    assert ids.pop("batch_left {}") == run.release.batch_left
    assert ids.pop("batch_left {'cache_implementation': 'static'}") == run.release.batch_left
    assert ids == run.release.greedy_ids


def chat_batch_and_static_step_give_the_released_tokens(run):
    told = run.told[0]
    expected = [run.release.greedy_ids[name] for name in told["asked"]]
    assert told["chat"] == told["batch"] == expected
    assert told["static"] == expected[0]


def all_processes_have_the_same(run):
    """Bit for bit, and also where an answer is drawn without a seed."""
    for tensors, told in zip(run.tensors[1:], run.told[1:], strict=True):
        assert all(torch.equal(tensors[name], value) for name, value in run.tensors[0].items())
        assert told == run.told[0]
    drawn = {tuple(ids) for ids in run.told[0]["drawn"]}
    assert len(drawn) == 4  # each answer, and each row of a batch, has a stream of its own


def a_seed_gives_the_answer_of_one_process(run):
    vlm = run.release.vlm()
    messages = run.told[0]["messages"]
    alone = vlm.chat(messages, temperature=2.0, max_new_tokens=10, seed=5).token_ids
    assert run.told[0]["seeded"] == alone


def each_process_holds_a_share(run):
    whole = {name: parameter.nbytes for name, parameter in run.release.loaded.model.named_parameters()}
    shared = [name for name in whole if "_dense.weight" in name or "mlp" in name or name == "lm_head.weight"]
    assert len(shared) > 20
    for told in run.told:
        assert all(told["bytes"][name] * run.size == whole[name] for name in shared if "fc2.bias" not in name)
    # Of the fused rows also, where each process has its own key/value heads.
    fused = "model.layers.0.self_attn.vision_expert_query_key_value.weight"
    copies = run.size > 2  # 4 query and 2 key/value heads among 4: one of each kind in a process
    assert run.told[0]["bytes"][fused] * (8 if copies else 2 * run.size) == whole[fused] * (3 if copies else 2)


def features_that_do_not_divide_are_gathered_in_order(run):
    assert torch.equal(run.tensors[0]["uneven.output"], torch.arange(10.0)[None] * 2)


def a_share_is_neither_saved_nor_trained(run):
    assert f"one of {run.size} shares" in run.told[0]["save"] == run.told[0]["state"]
    assert not run.told[0]["has_saved"]
    assert not run.told[0]["is_trainable"]


def equal_row_blocks_would_be_wrong(run):
    """The trap of a fused query_key_value: the same network, cut without regard to heads."""
    if run.size > 2:
        return  # among 4 processes equal blocks do not even have the shape of heads
    wrong, right = run.tensors[0]["equal_blocks.logits"], run.expected["chat_image.logits"]
    assert (wrong - right).abs().max() > 100 * LOGITS_APART


@pytest.mark.timeout(900)  # two minutes where ten programs share two cores
@pytest.mark.parametrize(("name", "size"), [("cogvlm", 2), ("cogvlm2", 2), ("cogvlm2", 4)])
def test_several_processes_give_what_one_gives(name, size, releases, tmp_path):
    """One test a run, so that pytest's workers do not start the processes again.

    cogvlm2 has 2 key/value heads: among 4 processes each of them is held twice.
    """
    run = Run(releases[name], size, tmp_path)
    logits_and_image_features_are_those_of_one_process(run)
    greedy_tokens_are_the_released_ones(run)
    chat_batch_and_static_step_give_the_released_tokens(run)
    all_processes_have_the_same(run)
    a_seed_gives_the_answer_of_one_process(run)
    each_process_holds_a_share(run)
    features_that_do_not_divide_are_gathered_in_order(run)
    a_share_is_neither_saved_nor_trained(run)
    equal_row_blocks_would_be_wrong(run)


# -- the cut -----------------------------------------------------------------------------------------------------------


def test_heads_are_cut_inside_each_of_query_key_and_value():
    # 4 query heads, 2 key/value heads of 3 rows each: rows 0-11 q, 12-17 k, 18-23 v.
    assert head_spans(4, 2, 24, rank=0, size=2) == ((0, 6), (12, 15), (18, 21))
    assert head_spans(4, 2, 24, rank=1, size=2) == ((6, 12), (15, 18), (21, 24))
    assert head_spans(4, 2, 24, rank=2, size=4) == ((6, 9), (15, 18), (21, 24))  # head 2 asks key/value head 1


@pytest.mark.parametrize(("name", "size"), [("cogvlm2-llama3-chat-19B", 8), ("cogvlm-chat-v1.1", 16)])
def test_a_released_model_is_shared_out_whole(name, size, monkeypatch):
    covered: dict[str, list[tuple[int, int]]] = {}
    for rank in range(size):
        as_process(monkeypatch, rank, size)
        network = lavish.build(name, num_hidden_layers=2, vision_config={"num_hidden_layers": 2})
        whole = {key: value.shape for key, value in network.named_parameters()}
        cuts = cut_network(network, TENSOR_PARALLEL_PLAN)
        for key, cut in cuts.items():
            covered.setdefault(key, []).extend(cut.spans)
            assert tuple(whole[key]) == cut.whole
            local = network.get_parameter(key).shape
            assert local[cut.dim] == sum(stop - start for start, stop in cut.spans) == cut.whole[cut.dim] // size
    for key, spans in covered.items():
        ends = sorted(spans)
        assert ends[0][0] == 0
        assert all(left[1] == right[0] for left, right in pairwise(ends)), key
    kept_whole = {key.split(".")[-2] for key in whole.keys() - covered.keys()}
    assert not {"gate_proj", "up_proj", "down_proj", "query_key_value", "fc1", "lm_head"} & kept_whole


@pytest.mark.parametrize(("name", "share"), [("cogvlm2-llama3-chat-19B", 0.155), ("cogvlm-chat-v1.1", 0.135)])
def test_a_share_of_eight_is_little_more_than_an_eighth(name, share, monkeypatch):
    """The embedding table is whole in every process; the rest is small."""
    as_process(monkeypatch, 0, 8)
    network = lavish.build(name)
    before = sum(parameter.numel() for parameter in network.parameters())
    cut_network(network, TENSOR_PARALLEL_PLAN)
    assert sum(parameter.numel() for parameter in network.parameters()) < share * before


def test_a_vocabulary_that_does_not_divide_is_shared_out(monkeypatch):
    spans = []
    for rank in range(4):
        as_process(monkeypatch, rank, 4)
        network = lavish.build("cogvlm2-llama3-chat-19B", num_hidden_layers=1, vocab_size=10)
        spans += cut_network(network, TENSOR_PARALLEL_PLAN)["lm_head.weight"].spans
        assert network.lm_head.weight.shape[0] == spans[-1][1] - spans[-1][0]
    assert spans == [(0, 3), (3, 6), (6, 9), (9, 10)]


def test_loading_a_share_stays_strict(v2, monkeypatch):
    as_process(monkeypatch, 1, 2)
    tensors = hf.read(v2.folder)
    network = lavish.build(v2.folder, vocab_size=478)
    cuts = cut_network(network, TENSOR_PARALLEL_PLAN)
    with pytest.raises(ShapeMismatch, match=r"\(480, 64\) in .*, \(478, 64\) by the config"):
        load_into(network, tensors, dtype=None, device="cpu", cuts=cuts)
    network = lavish.build(v2.folder, dtype="float32")
    load_into(network, tensors, dtype=None, device="cpu", cuts=cut_network(network, TENSOR_PARALLEL_PLAN))
    assert torch.equal(network.lm_head.weight, tensors["lm_head.weight"][240:])
    down = "model.layers.1.mlp.vision_mlp.down_proj.weight"
    assert torch.equal(network.get_parameter(down), tensors[down][:, 72:])
    assert network.get_parameter(down).is_contiguous()


# -- refusals: before any weight is read, and before the processes meet ------------------------------------------------


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_is_never_run_silently(v2, size, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ConfigError, match=r"this program is one\. Start it with: torchrun --nproc-per-node 2"):
        lavish.load(v2.folder, parallel="tensor")


def test_several_processes_without_the_option_are_told_once(v2, monkeypatch, caplog):
    as_process(monkeypatch, 1, 2)
    lavish.load(v2.folder, device="cpu")
    assert not caplog.records
    as_process(monkeypatch, 0, 2)
    lavish.load(v2.folder, device="cpu")
    assert "This run has 2 processes, and each loads the whole network for itself." in caplog.text


def test_an_unknown_way_is_refused(v2):
    with pytest.raises(ConfigError, match=r"No parallel='tensors'\. Did you mean 'tensor'\?"):
        lavish.load(v2.folder, parallel="tensors")


def test_heads_that_do_not_divide_are_refused(release, monkeypatch):
    as_process(monkeypatch, 0, 3)
    with pytest.raises(ConfigError, match=r"3 processes: the 4 heads of .* do not divide\. Use 2 or 4 of them"):
        lavish.load(release.folder, device="cpu", parallel="tensor")
    assert not torch.distributed.is_initialized()


def test_key_value_heads_that_do_not_divide_are_refused(monkeypatch):
    as_process(monkeypatch, 0, 4)
    network = lavish.build(
        "cogvlm2-llama3-chat-19B",
        num_hidden_layers=1,
        hidden_size=3072,
        num_attention_heads=24,
        num_multi_query_heads=6,
    )
    with pytest.raises(ConfigError, match=r"the 6 key/value heads of .* neither divide nor can be repeated evenly"):
        cut_network(network, TENSOR_PARALLEL_PLAN)


def test_features_that_do_not_divide_are_refused(v2, monkeypatch):
    as_process(monkeypatch, 0, 2)
    with pytest.raises(ConfigError, match=r"the 143 features of '.*gate_proj' do not divide"):
        lavish.load(v2.folder, device="cpu", parallel="tensor", config={"intermediate_size": 143})


def test_what_needs_whole_layers_is_refused(v2, monkeypatch, tmp_path):
    as_process(monkeypatch, 0, 2)
    with pytest.raises(ConfigError, match="takes no quantised network"):
        lavish.load(v2.folder, device="cpu", parallel="tensor", quantization="int8")
    with pytest.raises(ConfigError, match="takes no adapter"):
        lavish.load(v2.folder, device="cpu", parallel="tensor", adapter=tmp_path)
    with pytest.raises(ConfigError, match="takes no pack=True"):
        lavish.load(v2.folder, device="cpu", parallel="tensor", pack=True)
    with pytest.raises(ConfigError, match="device_map= gives the blocks of one process several"):
        lavish.load(v2.folder, device="cpu", parallel="tensor", device_map="auto")
    assert not torch.distributed.is_initialized()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    as_process(monkeypatch, 0, 2)
    with pytest.raises(ConfigError, match=r"device='cuda:0' would be every process's"):
        local_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with pytest.raises(ConfigError, match="this machine has"):
        local_device("auto")
