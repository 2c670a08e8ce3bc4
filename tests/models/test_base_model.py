"""A model that a user registers, as LAVIS's tutorials write it: its YAML, its weights, its processors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lavish.common.errors import ConfigError, MissingKeys
from lavish.common.registry import registry
from lavish.models import load_model, load_model_and_preprocess
from lavish.models.base_model import BaseModel, model_section
from lavish.processors.base_processor import BaseProcessor

YAML = """
model:
  arch: test_counter
  model_type: base
  width: 4
  load_finetuned: true
preprocess:
  vis_processor:
    train: {name: blip_image_eval, image_size: 16}
"""


class Counter(BaseModel):
    """One layer, whose width the YAML tells."""

    def __init__(self, width: int, is_loaded: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)
        self.is_loaded = is_loaded

    @classmethod
    def from_config(cls, cfg: Any) -> "Counter":
        return cls(cfg["width"], cfg["load_finetuned"])

    def forward(self, samples: Any) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(samples["x"]).sum()}


@pytest.fixture(scope="module", autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> None:
    file = tmp_path_factory.mktemp("configs") / "counter.yaml"
    file.write_text(YAML, encoding="utf-8")
    Counter.PRETRAINED_MODEL_CONFIG_DICT = {"base": str(file)}
    registry.register_model("test_counter")(Counter)


def test_devices_and_flags_are_checked_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(Counter, "from_pretrained", lambda *args, **options: pytest.fail("weights were read"))
    for device, words in (("gpu", "No device 'gpu'"), ("cuda", "this machine has 0 of that kind")):
        with pytest.raises(ConfigError, match=words):
            load_model_and_preprocess("test_counter", "base", is_eval=True, device=device)
    with pytest.raises(ConfigError, match="is_eval is True or False, not 'no'"):
        load_model("test_counter", "base", is_eval="no")


def test_by_its_yaml() -> None:
    model, pictures, texts = load_model_and_preprocess("test_counter", "base", is_eval=True)
    assert isinstance(model, Counter)
    assert model.is_loaded
    assert not model.training
    assert model({"x": torch.ones(1, 4)})["loss"].shape == ()
    assert pictures["train"].image_size == 16
    assert type(pictures["eval"]) is type(texts["train"]) is type(texts["eval"]) is BaseProcessor


def test_with_other_settings_and_weights(tmp_path: Path) -> None:
    source = Counter(6, False)
    torch.save({"model": source.state_dict(), "epoch": 1}, tmp_path / "x.pth")
    model = load_model("test_counter", "base", checkpoint=tmp_path / "x.pth", config={"width": 6})
    assert model.training
    assert not model.is_loaded, "no released weights are loaded first"
    assert torch.equal(model.layer.weight, source.layer.weight)
    assert load_model("test_counter", "base", width=3).layer.in_features == 3
    torch.save({"model": {"layer.weight": source.layer.weight}}, tmp_path / "y.pth")
    with pytest.raises(MissingKeys, match=r"layer\.bias"):
        load_model("test_counter", "base", checkpoint=tmp_path / "y.pth", config={"width": 6})


def test_beside_a_class_of_transformers() -> None:
    class Talker(GPT2LMHeadModel, BaseModel):
        """What LAVIS's own dialogue model inherits from."""

        PRETRAINED_MODEL_CONFIG_DICT = {"base": "nowhere.yaml"}

    talker = Talker(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=5))
    assert talker.show_n_params(return_str=False) == sum(parameter.numel() for parameter in talker.parameters())
    assert Talker.default_config_path("base").name == "nowhere.yaml"


def test_wrong_yaml(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("run: {}", encoding="utf-8")
    with pytest.raises(ConfigError, match="no section 'model'"):
        model_section(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match="has no model type 'large'"):
        load_model("test_counter", "large")
    with pytest.raises(NotImplementedError, match="override from_config"):
        BaseModel.from_config({})
    with pytest.raises(NotImplementedError, match="cannot be trained"):
        BaseModel()({})
