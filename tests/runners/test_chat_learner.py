"""Chat families on conversations: LoRA, whole, by parts; what a run leaves is opened by `lavish.load`."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tiny_lavis
import torch
from PIL import Image
from tolerance import BIGGER_BATCH

import lavish
from lavish.common.config import Config
from lavish.common.errors import ConfigError, DataError, LavishError, MissingDependency
from lavish.common.registry import registry
from lavish.datasets.formats.dataset import ConversationDataset
from lavish.runners.recipe import open_recipe, train
from lavish.runners.runner_base import RunnerBase
from lavish.tasks.base_task import BaseTask

pytest.importorskip("peft")
FIXTURES = tiny_lavis.FIXTURES
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

MINIGPT4 = {
    "path": str(FIXTURES / "minigpt4qwen/open/checkpoint"),
    "pieces": {"llm": str(FIXTURES / "qwen/llm")},
    "config": {"vision_config": {"num_attention_heads": 4}},
}
TINY: dict[str, dict[str, Any]] = {
    "cogvlm": {"path": str(FIXTURES / "cogvlm2/open/checkpoint")},
    "glm4v_9b": {"path": str(FIXTURES / "glm4v/open/checkpoint")},
    "minigpt4_qwen": MINIGPT4,
    "clip_qwen": {"path": str(FIXTURES / "clip_qwen/open/checkpoint")},
}


def rows(folder: Path, count: int = 4) -> str:
    """Write conversations about pictures of one colour as JSON lines, and give the path."""
    tiny_lavis.draw(folder / "images", count)
    lines = []
    for at in range(count):
        color = list(tiny_lavis.COLORS)[at % 4]
        content = [{"type": "image", "image": tiny_lavis.name(at)}, {"type": "text", "text": "Which colour?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": color}]
        lines.append(json.dumps({"id": f"row{at}", "messages": messages}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return str(folder / "data.jsonl")


def recipe(folder: Path, model: dict[str, Any], **run: Any) -> Any:
    data = {"annotations": {"train": {"storage": rows(folder)}}, "images": {"storage": str(folder / "images")}}
    keys = {
        "init_lr": 1e-2,
        "max_epoch": 3,
        "batch_size_train": 2,
        "log_freq": 1,
        "device": "cpu",
        "max_grad_norm": 1.0,
    }
    content = {
        "model": {"arch": "chat", "model_type": "default", **model},
        "datasets": {"conversations": {"build_info": data}},
        "run": {"task": "image_text_pretrain", "output_dir": str(folder / "out"), **keys, **run},
    }
    return open_recipe(tiny_lavis.write(folder, content))


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def ask(vlm: "lavish.VLM") -> torch.Tensor:
    parts = [{"type": "image", "image": Image.new("RGB", (20, 16), (200, 30, 30))}, {"type": "text", "text": "Which?"}]
    inputs = vlm.processor.apply_chat_template([{"role": "user", "content": parts}])
    with torch.no_grad():
        return vlm.model(**inputs).logits


def pieces(name: str) -> dict[str, Any]:
    return {**TINY[name].get("pieces", {}), **({"config": TINY[name]["config"]} if "config" in TINY[name] else {})}


@pytest.mark.parametrize("name", ["cogvlm", "glm4v_9b", "minigpt4_qwen"])
def test_an_adapter_is_learnt_and_opened(tmp_path: Path, name: str) -> None:
    train(recipe(tmp_path, {**TINY[name], "lora": {"r": 4}}))
    found = losses(tmp_path)
    assert found[-1] < found[0]
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert ("adapter_config.json" in written) == (name != "minigpt4_qwen"), (
        "of a release in pieces the whole is written"
    )
    trained = lavish.load(tmp_path / "out", device="cpu")
    base = lavish.load(TINY[name]["path"], device="cpu", **pieces(name))
    assert not torch.equal(ask(trained), ask(base))
    assert trained.chat([{"role": "user", "content": "Hello"}], max_new_tokens=2).text is not None


def test_accumulation_is_one_big_batch_however_long_the_answers_are(tmp_path: Path) -> None:
    """The loss is a mean over tokens: passes weigh by them, not by samples."""
    path, lines = rows(tmp_path), []
    for at, line in enumerate(Path(path).read_text().splitlines()):
        row = json.loads(line)
        row["messages"][1]["content"] = "red " * (1 + 7 * at)
        lines.append(json.dumps(row))
    found = []
    for batch_size, passes, workers in ((4, 1, 0), (1, 4, 2)):
        changes = {"batch_size_train": batch_size, "accum_grad_iters": passes, "num_workers": workers, "max_epoch": 2}
        config = recipe(tmp_path, {**TINY["glm4v_9b"], "lora": {"r": 4}}, **changes)
        Path(path).write_text("\n".join(lines))
        config.config.run.output_dir = str(tmp_path / f"by{batch_size}")
        folder = train(config)["run"]
        found.append([json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()])
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), **BIGGER_BATCH)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_is_none_is_told_in_one_line(tmp_path: Path, workers: int) -> None:
    config = recipe(tmp_path, {**TINY["glm4v_9b"], "lora": {"r": 4}}, num_workers=workers)
    (tmp_path / "images" / tiny_lavis.name(1)).write_bytes(b"GIF89a?")
    with pytest.raises(LavishError) as told:
        train(config)
    assert tiny_lavis.name(1) in str(told.value)
    assert "Traceback" not in str(told.value)


@pytest.mark.parametrize("name", TINY)
def test_the_projector_alone_is_learnt(tmp_path: Path, name: str) -> None:
    part = {"clip_qwen": ["projector", "lora"]}.get(name, ["projector"])
    model = registry.get_model_class("chat").from_config({**TINY[name], "train": part})
    learnt = {key for key, weight in model.named_parameters() if weight.requires_grad}
    assert learnt
    assert all("projector" in key or "linear_proj" in key or ".lora_" in key or ".vision." in key for key in learnt)
    before = {key: weight.clone() for key, weight in model.named_parameters()}
    train(recipe(tmp_path, {**TINY[name], "train": part}, max_epoch=1))
    after = lavish.load(tmp_path / "out", device="cpu")
    changed = {
        key
        for key, weight in after.model.named_parameters()
        if f"network.{key}" in before and not torch.equal(before[f"network.{key}"], weight)
    }
    assert changed <= {key.removeprefix("network.") for key in learnt}
    if name != "clip_qwen":  # whose adapter was merged
        assert changed


def test_everything_is_learnt(tmp_path: Path) -> None:
    train(recipe(tmp_path, {**TINY["cogvlm"], "train": ["all"], "freeze": ["tower"]}, activation_checkpointing=True))
    found = losses(tmp_path)
    assert found[-1] < 0.9 * found[0]
    after, before = (lavish.load(path, device="cpu").model for path in (tmp_path / "out", TINY["cogvlm"]["path"]))
    tower = "model.vision.transformer.layers.0.mlp.fc1.weight"
    expert = "model.layers.0.mlp.language_mlp.up_proj.weight"
    states = after.state_dict(), before.state_dict()
    assert torch.equal(states[0][tower], states[1][tower])
    assert not torch.equal(states[0][expert], states[1][expert])


def test_activations_that_are_computed_again_change_nothing(tmp_path: Path) -> None:
    for name, again in (("kept", False), ("again", True)):
        (tmp_path / name).mkdir()
        train(recipe(tmp_path / name, {**TINY["glm4v_9b"], "train": ["all"]}, activation_checkpointing=again))
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)


def test_what_learns_is_float32_on_a_bfloat16_model(tmp_path: Path) -> None:
    """A step of 1e-5 on bfloat16 weights would leave most of them as they were."""
    section = {**TINY["cogvlm"], "dtype": "bfloat16", "train": ["projector"]}
    model = registry.get_model_class("chat").from_config(section)
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert {weight.dtype for weight in model.parameters() if not weight.requires_grad} == {torch.bfloat16}
    train(recipe(tmp_path, section, init_lr=1e-5, lr_sched="constant_lr", max_epoch=1))
    held = torch.load(next((tmp_path / "out").glob("*_last.pth")), weights_only=True)["model"]
    name = "network.model.vision.linear_proj.dense_4h_to_h.weight"
    before = dict(model.named_parameters())[name]
    assert (held[name] != before).float().mean() > 0.99
    assert lavish.load(tmp_path / "out", device="cpu").model.dtype == torch.bfloat16


def test_the_releases_mask_is_another_loss(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    values = []
    for compat in ("", "release"):
        model = registry.get_model_class("chat").from_config(
            {**TINY["cogvlm"], "train": ["projector"], "compat": compat}
        )
        values.append(float(model.eval()({"messages": [turns]})["loss"].detach()))
    assert values[0] != values[1]


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "nothing would learn"),
        ({"train": ["projectr"]}, "no weight of the model is of 'projectr'. Did you mean 'projector'"),
        ({"lora": {"r": 0}}, "r is 0"),
        ({"lora": {"target_modules": ["q_proj"]}}, "no linear layer of .* is called 'q_proj'.*query_key_value"),
        ({"lora": {"rank": 4}}, r"model\.lora\.rank.*unknown key"),
        ({"quantization": "nf4", "train": ["projector"]}, r"set model\.lora"),
        ({"quantization": "nf5", "lora": {}}, "nf4"),
    ],
)
def test_wrong_sections_are_told(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        registry.get_model_class("chat").from_config({**TINY["glm4v_9b"], **section})


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_nf4_needs_bitsandbytes() -> None:
    with pytest.raises(MissingDependency, match="pip install bitsandbytes"):
        registry.get_model_class("chat").from_config({**TINY["glm4v_9b"], "quantization": "nf4", "lora": {}})


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_an_adapter_is_learnt_on_four_bits(tmp_path: Path) -> None:
    train(recipe(tmp_path, {**TINY["glm4v_9b"], "quantization": "nf4", "lora": {"r": 4}}))
    found = losses(tmp_path)
    assert found[-1] < found[0]
    assert lavish.load(tmp_path / "out", device="cpu").adapters == ("default",)


def test_samples_of_another_task_are_told() -> None:
    model = registry.get_model_class("chat").from_config({**TINY["glm4v_9b"], "train": ["projector"]})
    with pytest.raises(DataError, match="no 'messages'; they have image"):
        model({"image": None})


def test_conversations_of_like_length_share_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = registry.get_model_class("chat").from_config({**TINY["glm4v_9b"], "train": ["projector"]})
    text, picture = {"role": "user", "content": "abc"}, {"type": "image", "image": "x.png"}
    spoken = {"role": "user", "content": [picture, {"type": "text", "text": "ab"}]}
    assert model.sample_length({"messages": [text]}) == 3
    assert model.sample_length({"messages": [spoken, text]}) > 1000
    with monkeypatch.context() as patched:
        patched.setattr("lavish.datasets.formats.dataset.with_pictures", None)  # no picture is opened for a length
        data = ConversationDataset(ann_paths=[rows(tmp_path)], vis_root=tmp_path / "images")
        config = Config({"run": {"output_dir": str(tmp_path / "order"), "group_by_length": True, "device": "cpu"}})
        runner = RunnerBase(config, BaseTask(), model, {"train": data})
        assert runner._lengths() == [4000 + len("Which colour?") + len(name) for name in tiny_lavis.COLORS]
    train(recipe(tmp_path, {**TINY["glm4v_9b"], "train": ["projector"]}, group_by_length=True, max_epoch=1))
    assert len(losses(tmp_path)) == 2
