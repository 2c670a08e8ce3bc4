"""The adapter for lmms-eval: found by its entry point, light, and asked as that host asks.

The host is not installed with lavish; its two classes that the adapter touches are drawn here as version 0.7.3 has
them. Where the host is installed the real ones are taken.
"""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from lavish.common.errors import ConfigError
from lavish.inference.load import POCKET
from lavish.tasks import lmms_eval_model
from lavish.tasks.lmms_eval_model import generation_of, messages_of

HOST_IS_HERE = find_spec("lmms_eval") is not None
PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"


class Base:
    """The host's `lmms`."""

    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cached: list[Any] = []
        self.cache_hook = SimpleNamespace(add_partial=lambda *args: self.cached.append(args))
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank


@dataclass(frozen=True)
class Manifest:
    """The host's `ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    if HOST_IS_HERE:
        return
    parts = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Base},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }
    for name, attributes in parts.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("host")
def test_the_host_finds_the_class() -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    entry = EntryPoint("lavish", project["entry-points"]["lmms_eval.models"]["lavish"], "lmms_eval.models")
    made = entry.load()()
    module, _, name = made.chat_class_path.rpartition(".")
    assert (made.model_id, module, name) == ("lavish", lmms_eval_model.__name__, "Lavish")
    cls = getattr(lmms_eval_model, name)
    assert cls.is_simple is False
    assert cls.__name__ == "Lavish"


def test_the_module_is_light() -> None:
    code = "import sys, lavish.tasks.lmms_eval_model; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.usefixtures("host")
def test_it_answers_as_lavish_does() -> None:
    model = lmms_eval_model.Lavish(path=str(POCKET), batch_size="2", device="cpu", chat_template="vqa")
    colours = ("red", "blue")
    docs = [{"image": Image.new("RGB", (60, 60), one), "question": "What color is it?"} for one in colours]
    model.task_dict = {"mine": {"test": docs}}

    def to_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
        return [{"role": "user", "content": content}]

    kinds = [{"max_new_tokens": 4, "temperature": 0, "num_beams": 1}, {"max_new_tokens": 2, "until": ["\n\n"]}]
    requests = [
        SimpleNamespace(args=(f"q{at}", to_messages, kinds[at % 2], at // 2, "mine", "test")) for at in range(4)
    ]
    found = model.generate_until(requests)
    for at, answer in enumerate(found):
        messages = messages_of(to_messages(docs[at // 2]))
        expected = model.vlm.chat(messages, chat_template="vqa", max_new_tokens=(4, 2)[at % 2])
        assert answer == expected.text.strip()
    if not HOST_IS_HERE:
        assert len(model.cached) == 4
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="lavish answers"):
            method([])


@pytest.mark.usefixtures("host")
def test_several_processes_would_answer_everything_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="in one process, and this run has 2"):
        lmms_eval_model.Lavish(path=str(POCKET))


@pytest.mark.usefixtures("host")
def test_wrong_arguments() -> None:
    with pytest.raises(ConfigError, match="names the model"):
        lmms_eval_model.Lavish()
    with pytest.raises(ConfigError, match=r"chat_templat: no such option. Did you mean 'chat_template'"):
        lmms_eval_model.Lavish(path="x", chat_templat="vqa")
    with pytest.raises(ConfigError, match=r"type 'video'"):
        messages_of([{"role": "user", "content": [{"type": "video", "url": "v"}]}])
    with pytest.raises(ConfigError, match=r"max_new_token is not known. Did you mean 'max_new_tokens'"):
        generation_of({"max_new_token": 3})


def test_generation() -> None:
    assert generation_of({}) == {"do_sample": False, "max_new_tokens": 128, "stop": ()}
    drawn = generation_of({"temperature": 0.5, "top_p": 0.9, "until": "\n", "max_gen_toks": 7})
    assert drawn == {"temperature": 0.5, "top_p": 0.9, "max_new_tokens": 7, "stop": ("\n",)}
    assert generation_of({"temperature": 0, "top_p": 0.9})["do_sample"] is False


def test_the_wrapper_for_vlmevalkit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of docs/evaluation.md, called as open-compass/VLMEvalKit does (vlmeval/vlm/base.py): a list of objects
    with type and value."""
    page = (PROJECT.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "vlmeval" in block]
    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.base"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules["vlmeval.vlm.base"])["BaseModel"] = type("BaseModel", (), {"INTERLEAVE": False})
    made: dict[str, Any] = {}
    exec(code, made)
    picture = str(POCKET / "pictures" / "star-square-circle.png")
    model = made["Lavish"](POCKET, chat_template="vqa")
    message = [{"type": "image", "value": picture}, {"type": "text", "value": "What color is the star?"}]
    assert model.generate_inner(message, dataset="MMBench") == "green"
    assert all(callable(one) for one in made["supported"].values())


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Other'"):
        lmms_eval_model.Other  # noqa: B018
