"""transformers' Auto classes for every chat family, and never the code of a folder."""

from pathlib import Path

import pytest
from test_families import TINY, load_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

import lavish
from lavish.models import FAMILIES, family

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


def test_the_families_here_are_those_that_register() -> None:
    assert set(TINY) == {row.name for row in FAMILIES if row.opener is None}
