"""Each benchmark runs to its end at a toy size, and prints what it promises. No time is looked at."""

import contextlib
import importlib
import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tolerance import RELEASE_WAY

from lavish.checkpoints import hf
from lavish.models.cogvlm import weights
from lavish.models.cogvlm.config import read_config
from lavish.models.cogvlm.model import CogVLMForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


NEEDS_NF4 = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")


@pytest.fixture
def run(monkeypatch, capsys):
    """Give a function that runs the `main` of a benchmark with arguments, and gives what it printed."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run(name: str, *arguments: str) -> str:
        module = importlib.import_module(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--threads", "1", *arguments])
        assert module.main() == 0
        return capsys.readouterr().out

    yield run
    for name in [name for name, module in sys.modules.items() if _is_benchmark(module)]:
        del sys.modules[name]


@pytest.fixture
def in_this_process(run, monkeypatch):
    """Let the parts of a benchmark that are processes of their own run here, which spares their imports."""

    def in_a_process(script: str, arguments: list[str]):
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert importlib.import_module(Path(script).stem).main() == 0
        return json.loads(printed.getvalue().splitlines()[-1])

    monkeypatch.setattr(importlib.import_module("_memory"), "in_a_process", in_a_process)


def _is_benchmark(module) -> bool:
    return str(getattr(module, "__file__", None)).startswith(str(BENCHMARKS))


def test_prefill_routing(run):
    printed = run("prefill_routing", "--size", "tiny", "--text-tokens", "9", "--rounds", "1", "--pack")
    for line in ("one row:", "two rows, one padded:", "of it", "lavish, packed", "the tower included", "goal >= 1.5 x"):
        assert line in printed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21's old name
def test_batch_speed(run):
    printed = run("batch_speed", "--size", "tiny", "--rounds", "1", "--new-tokens", "2")
    for name in ("cogvlm", "glm4v_9b", "clip_qwen", "minigpt4_qwen"):
        assert f"{name} (" in printed
    assert printed.count("goal >= 3 x") == 4


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # as above
def test_feature_cache(run):
    pytest.importorskip("peft")
    path = str(Path(__file__).parents[1] / "fixtures/glm4v/open/checkpoint")
    printed = run("feature_cache", "--path", path, "--pictures", "2", "--batch-size", "1", "--rounds", "1")
    for line in ("the same: True", "at most 0.0e+00 apart", "without / kept", "without / first"):
        assert line in printed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # as above
def test_packing(run):
    pytest.importorskip("peft")
    path = str(Path(__file__).parents[1] / "fixtures/glm4v/open/checkpoint")
    printed = run("packing", "--path", path, "--words", "1", "2", "9", "--rounds", "1")
    for line in ("apart, relative", "of it padding; joined: (2, ", "padded / joined"):
        assert line in printed


def test_inspect_speed(run):
    printed = run("inspect_speed", "--layers", "2", "--rounds", "1")
    for name in ("hf", "sat", "sat-4-ranks", "mindspore", "deepspeed"):
        assert f"\n{name} " in f"\n{printed}"
    assert "goal < 1 s (wall time): " in printed


def test_the_release_way_gives_the_release_logits(run):
    """The peer is no straw man: it gives what the golden fixture of the release gives."""
    release = importlib.import_module("_release_routing")
    fixture = BENCHMARKS.parent / "tests" / "fixtures" / "cogvlm2" / "open"
    fields = json.loads((fixture / "checkpoint" / "config.json").read_text(encoding="utf-8"))
    with torch.device("meta"):
        network = CogVLMForCausalLM(read_config(fields, "config.json"))
    tensors = hf.read(fixture / "checkpoint")
    left = hf.load_into(network, tensors, dtype=torch.float32, device="cpu", rules=weights.RULES)
    weights.complete(network, left)
    prompts = json.loads((fixture / "expected.json").read_text(encoding="utf-8"))
    expected = load_file(fixture / "expected.safetensors")
    inputs = [torch.tensor([prompts["chat_image"][name]]) for name in ("input_ids", "token_type_ids", "attention_mask")]
    logits = release.prefill(network.eval(), *inputs, expected["chat_image.vision.features"][None])
    torch.testing.assert_close(logits[0], expected["chat_image.logits"], **RELEASE_WAY)


def test_decode_vs_llama(run):
    printed = run("decode_vs_llama", "--size", "tiny", "--text-tokens", "9", "--new-tokens", "5", "--rounds", "1")
    for line in ("Llama, generate", "lavish, packed", "lavish, int8", "of the bound", "goal >= 1.2 x"):
        assert line in printed


@pytest.mark.slow
def test_load_first_token(run):
    printed = run("load_first_token", "--gigabytes", "0.001", "--rounds", "1", "--warmup", "0")
    for line in ("checkpoint of", "import torch, transformers", "GB/s", "goal <= 1.5 x"):
        assert line in printed


def test_gpu_cogvlm2_on_a_toy(run, tmp_path):
    arguments = ("--device", "cpu", "--tiny", "--folder", str(tmp_path / "toy"), "--rounds", "1")
    sizes = ("--text-tokens", "9", "--new-tokens", "4", "--steps", "eager", "graph")
    printed = run("gpu_cogvlm2", *arguments, *sizes)
    for line in ("written to", "load:", "prefill: 15 tokens", "tower", "4 of 4 tokens as eager"):
        assert line in printed
    assert "is there" in run("gpu_cogvlm2", *arguments, *sizes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        pytest.param("qlora", marks=pytest.mark.skipif(not find_spec("bitsandbytes"), reason="needs bitsandbytes")),
    ],
)
def test_gpu_train_cogvlm2_on_a_toy(run, kind):
    pytest.importorskip("peft")
    sizes = ("--text-tokens", "9", "--answer-tokens", "4", "--steps", "2")
    assert f"{kind}: 20 tokens; a step" in run("gpu_train_cogvlm2", "--device", "cpu", "--tiny", "--kind", kind, *sizes)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_gpu_train_cogvlm2_is_estimated_without_memory(run):
    pytest.importorskip("peft")
    printed = run("gpu_train_cogvlm2", "--estimate", "--scale", "0.05")
    for kind in ("lora", "qlora"):
        assert f"{kind}, estimated: 3331 tokens" in printed


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_lora_vs_peft(run, in_this_process):
    pytest.importorskip("peft")
    printed = run("lora_vs_peft", "--size", "tiny", "--rounds", "1", "--steps", "1", "--words", "3")
    for line in ("first losses", "of the bound", "of the time of autocast", "step time:", "peak memory:"):
        assert line in printed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dry_run_memory(run, in_this_process):
    printed = run("dry_run_memory", "--size", "tiny", "--cases", "BLIP caption, all")
    assert "furthest from the peak: " in printed
    assert "goal <= 15 %" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_cogvlm2_says_what_it_needs(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("gpu_cogvlm2")
    assert stopped.value.code == 2
    assert "no CUDA device here" in capsys.readouterr().err


def test_gpu_cogvlm2_refuses_a_full_size_cpu(run, capsys):
    with pytest.raises(SystemExit):
        run("gpu_cogvlm2", "--device", "cpu")
    assert "add --tiny" in capsys.readouterr().err


@pytest.mark.parametrize("share", [1.0, 0.1])
def test_the_full_layout_has_the_released_size(run, share):
    module = importlib.import_module("gpu_cogvlm2")
    layout = module.full_layout(share)
    nbytes = sum(tensor.nbytes for tensor in layout.state_dict().values())
    assert layout.lm_head.weight.is_meta
    assert (nbytes == 39_006_214_656) == (share == 1.0)
    # By the shapes of THUDM/cogvlm2-llama3-chat-19B, config.json: 117 TFLOP in the tower and 15.0 GB of weights a token
    if share == 1.0:
        assert 110e12 < module.tower_flops(layout) < 125e12
        assert importlib.import_module("_networks").bytes_per_token(layout) == pytest.approx(15.0e9, rel=0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_convert_speed(run):
    printed = run("convert_speed", "--size", "0.004", "--rounds", "1", "--stored", "float16")
    for line in ("0.00 GB float16", "of the copy's throughput", "goal >= 0.7", "peak memory:"):
        assert line in printed


def test_load_sat(run):
    printed = run("load_sat", "--size", "0.004", "--rounds", "1", "--model-parallel", "2")
    for line in ("2 rank(s)", "round 1: Hugging Face", "goal <= 1.3"):
        assert line in printed
