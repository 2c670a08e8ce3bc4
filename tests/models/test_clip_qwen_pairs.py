"""Tower + MLP + decoder of other makes, paired from a config: a SigLIP tower, a Llama or Qwen2 decoder."""

import pytest
import torch
from clip_qwen_fixture import IMAGES
from cogvlm_fixture import golden
from tolerance import SAME_MATH, close

import lavish
from lavish.common.errors import ConfigError
from lavish.models.clip_qwen.config import ClipQwenConfig, read_config
from lavish.models.clip_qwen.model import ClipQwenForConditionalGeneration
from lavish.models.clip_qwen.processor import ClipQwenProcessor
from lavish.processors.qwen_tokenizer import END_OF_TEXT, IM_END, IM_START, IMAGE
from lavish.processors.tokenizers import load_tokenizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWERS = ("siglip_vision_model", "clip_vision_model")
PICTURES = {"image_size": 28, "patch_size": 14}
DECODERS = {"llama": {"num_key_value_heads": 2}, "qwen2": {"num_key_value_heads": 2}}
SHORT = {"max_new_tokens": 6, "do_sample": False}


def pair(tower: str, decoder: str) -> lavish.VLM:
    """Random weights, and a tokenizer that the Hugging Face library reads, with the marks of ChatML."""
    tokenizer = load_tokenizer(golden("cogvlm2").folder / "checkpoint")
    tokenizer.add_special_tokens({"additional_special_tokens": [END_OF_TEXT, IM_START, IM_END, IMAGE]})
    first = len(tokenizer) - 4
    config = ClipQwenConfig(
        vision_config={"model_type": tower, **SMALL, **PICTURES},
        text_config={"model_type": decoder, **SMALL, **DECODERS[decoder], "vocab_size": len(tokenizer) + 5},
        image_token_id=first + 3,
        num_token_ids=len(tokenizer),
        pad_token_id=first,
        max_window_tokens=512,
    )
    torch.manual_seed(0)
    network = ClipQwenForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return lavish.VLM(network, ClipQwenProcessor.from_config(config, tokenizer))


def asked(*texts: str, image: int | None = None) -> list[dict]:
    picture = [] if image is None else [{"type": "image", "image": IMAGES / f"img{image}.png"}]
    return [{"role": "user", "content": [*picture, *({"type": "text", "text": text} for text in texts)]}]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_pair_answers_saves_and_loads(tower: str, decoder: str, tmp_path) -> None:
    vlm = pair(tower, decoder)
    rows = [asked("What is it?", image=0), asked("Hello"), asked("And this, in a few more words?", image=2)]
    replies, singles = vlm.batch(rows, **SHORT), [vlm.chat(row, **SHORT) for row in rows]
    assert [reply.token_ids for reply in replies] == [single.token_ids for single in singles]
    inputs = vlm.processor.apply_chat_template(rows)
    assert len(inputs["pixel_values"]) == 2
    with torch.no_grad():
        logits = vlm.model(**inputs).logits
        for index, row in enumerate(rows):
            alone = vlm.model(**vlm.processor.apply_chat_template(row)).logits[0]
            close(logits[index, -len(alone) :], alone, SAME_MATH)
        ids = vlm.model.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    assert ids[0, : len(singles[0].token_ids)].tolist() == singles[0].token_ids
    vlm.model.save_pretrained(tmp_path)
    vlm.processor.save_pretrained(tmp_path)
    again = lavish.load(tmp_path, device="cpu")
    with torch.no_grad():
        assert torch.equal(again.model(**again.processor.apply_chat_template(rows)).logits, logits)
    assert again.model.config.text_config.model_type == decoder


def test_parts_that_no_network_is_made_of() -> None:
    with pytest.raises(ConfigError, match=r"text_config\.model_type is 'lama'.* Did you mean 'llama'"):
        ClipQwenConfig(text_config={"model_type": "lama"})
    parts = {"vision_config": {"model_type": "vit", **SMALL, **PICTURES}, "text_config": {**SMALL, "vocab_size": 9}}
    with pytest.raises(ConfigError, match=r"vision_config\.model_type is 'vit'"):
        read_config(parts, "config.json")
