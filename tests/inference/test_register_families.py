"""transformers' Auto classes for every chat family, and never the code of a folder."""

import json
import shutil
from pathlib import Path

import pytest
from test_families import TINY, load_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import lavish
from lavish.models import FAMILIES, family
from lavish.models.glm4v_9b.tokenizer import ChatGLM4Tokenizer

# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize("name", TINY)
def test_a_saved_folder_loads_by_every_auto_class(name: str, tmp_path: Path) -> None:
    vlm, row = load_tiny(name), family(name)
    if vlm.adapters:
        vlm.merge_adapter()
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    lavish.register()
    assert type(AutoConfig.from_pretrained(tmp_path)) is row.config_class
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(tmp_path)) is row.model_class
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is row.processor_class
    messages = [{"role": "user", "content": "What is 图片?"}]
    expected = vlm.processor.apply_chat_template(messages)["input_ids"]
    assert processor.apply_chat_template(messages)["input_ids"].tolist() == expected.tolist()


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}])
@pytest.mark.parametrize("auto_map", [{"AutoTokenizer": ["t.ChatGLM4Tokenizer", None]}, ["t.ChatGLM4Tokenizer", None]])
def test_a_tokenizer_that_auto_map_alone_names(trust: dict, auto_map: object, tmp_path: Path) -> None:
    shutil.copytree(TINY["glm4v_9b"].folder, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    fields = {name: value for name, value in json.loads(file.read_text()).items() if name != "tokenizer_class"}
    file.write_text(json.dumps({**fields, "auto_map": auto_map}))
    (tmp_path / "t.py").write_text("raise SystemExit('code of a checkpoint was run')")
    lavish.register()
    lavish.register()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, **trust)
    assert type(tokenizer) is ChatGLM4Tokenizer
    expected = AutoTokenizer.from_pretrained(TINY["glm4v_9b"].folder)
    assert tokenizer.encode("Hello 图片") == expected.encode("Hello 图片")


def test_the_families_here_are_those_that_register() -> None:
    assert set(TINY) == {row.name for row in FAMILIES if row.opener is None}
