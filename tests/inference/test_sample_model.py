"""Models that hold no conversation, through lavish.load: captions, answers, embeddings, and clear words otherwise."""

from pathlib import Path

import pytest
import torch
from tolerance import ROUNDING

import lavish
from lavish.common.errors import ConfigError, DataError, UnknownLayout

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


HEADS = {"vision_config": {"num_attention_heads": 4}}  # in no file of LAVIS


def load(name: str) -> "lavish.VLM":
    return lavish.load(FIXTURES / name / "open" / "checkpoint", config=HEADS, device="cpu")


def picture(name: str) -> Path:
    return FIXTURES / name / "open" / "inputs" / "img0.png"


MESSAGES = [{"role": "user", "content": "What is this?"}]


def test_a_caption_file_captions_and_says_that_it_does_not_chat():
    model = load("blip_caption")
    caption = model.caption(picture("blip_caption"), num_beams=1, max_length=12, min_length=1)
    assert (
        caption
        == model.samples.generate({"image": [picture("blip_caption")]}, num_beams=1, max_length=12, min_length=1)[0]
    )
    assert model.capabilities == ("caption",)
    for call in (lambda: model.chat(MESSAGES), lambda: model.stream(MESSAGES), lambda: model.batch([MESSAGES])):
        with pytest.raises(ConfigError, match=r"is a BlipCaption, which has no (chat|stream|batch): it can caption"):
            call()
    with pytest.raises(ConfigError, match="has no embed"):
        model.embed(texts=["a dog"])
    with pytest.raises(ConfigError, match=r"No option 'num_beam'\. Did you mean 'num_beams'"):
        model.caption(picture("blip_caption"), num_beam=1)


def test_a_vqa_file_answers():
    model = load("blip_vqa")
    assert isinstance(model.answer(picture("blip_vqa"), "what is this?"), str)
    assert model.answer(picture("blip_vqa"), "what is this?", answer_list=["yes", "no"]) in ("yes", "no")


def test_a_feature_file_embeds():
    model = load("blip_feature_extractor")
    images, texts = model.embed([picture("blip_feature_extractor")]), model.embed(texts=["a dog", "a cat"])
    assert images.shape[1] == texts.shape[1]
    for vectors in (images, texts):
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(vectors)), **ROUNDING)
    with pytest.raises(ConfigError, match="embed takes"):
        model.embed()
    for wrong in ("abc", [], 3, picture("blip_feature_extractor")):
        with pytest.raises(ConfigError, match="texts is a list with one or more"):
            model.embed(texts=wrong)
        with pytest.raises(ConfigError, match="images is a list with one or more"):
            model.embed(images=wrong)


def test_a_dialogue_model_answers_about_features():
    model = lavish.load(FIXTURES / "gpt_dialogue" / "open" / "checkpoint", device="cpu")
    width = model.model.config.len_video_ft
    features = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
    answer = model.answer(features, "is he alone?", caption="a man walks", max_length=4)
    dialogue = {"caption": "a man walks", "dialog": [], "question": "is he alone?"}
    assert answer == model.samples.answer(dialogue, features, max_length=4)
    assert answer == model.answer(features.numpy(), "is he alone?", caption="a man walks", max_length=4)
    for wrong in (picture("blip_vqa"), "features.npy", features[0], features.long(), features.numpy().astype(object)):
        with pytest.raises(DataError, match="are a tensor or array of floating-point numbers"):
            model.answer(wrong, "is he alone?")
    with pytest.raises(DataError, match="no frames"):
        model.answer(features[:0], "is he alone?")
    with pytest.raises(DataError, match="NaN or infinity"):
        model.answer(features * float("nan"), "is he alone?")
    with pytest.raises(ConfigError, match="is a GPTDialogue, which has no chat: it can answer"):
        model.chat(MESSAGES)


def test_options_that_it_does_not_take():
    folder = FIXTURES / "blip_caption" / "open" / "checkpoint"
    for options in ({"quantization": "int8"}, {"adapter": folder}, {"rope": "float32"}, {"pack": True}):
        with pytest.raises(ConfigError, match=f"which takes no {next(iter(options))}="):
            lavish.load(folder, config=HEADS, device="cpu", **options)


def test_a_chat_network_captions_and_answers_and_has_no_embeddings(v2):
    image = v2.prompts["chat_image"][0][0]["content"][0]["image"]
    vlm = v2.vlm()
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    text = vlm.chat([{"role": "user", "content": content}], max_new_tokens=5).text
    assert vlm.answer(image, "What?", max_new_tokens=5) == text
    assert isinstance(vlm.caption(image, max_new_tokens=5), str)
    with pytest.raises(ConfigError, match="has no embeddings"):
        vlm.embed([image])


def test_a_pth_of_nothing_known(tmp_path):
    torch.save({"model": {"layer.weight": torch.zeros(2)}}, tmp_path / "some.pth")
    for path in (tmp_path, tmp_path / "some.pth"):
        with pytest.raises(UnknownLayout, match="names that begin with"):
            lavish.load(path, device="cpu")
