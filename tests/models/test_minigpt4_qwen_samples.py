"""MiniGPT4-Qwen by LAVIS's calls: `load_model`, `forward(samples)`, `generate`, `chat`."""

from functools import cache

import pytest
import torch
from minigpt4_qwen_fixture import (
    CHECKPOINT,
    HEADS,
    PIECES,
    TRAINED,
    expected,
    facts,
    prompts,
    shared_network,
    side_by_side,
    vlm,
)
from PIL import Image
from tolerance import MINIGPT4_QWEN
from transformers import GenerationConfig

from lavish.common.errors import ConfigError, DataError, PromptError, ShapeMismatch, UnexpectedKeys
from lavish.models import load_model, load_model_and_preprocess

SHORT = {"max_new_tokens": 14}


def load(checkpoint=TRAINED, **options):
    return load_model("minigpt4qwen", "qwen7b_chat", True, checkpoint=checkpoint, config=HEADS, **{**PIECES, **options})


@cache
def model():
    return load()


def images(*indices: int) -> torch.Tensor:
    return expected()["pixel_values"][list(indices)]


@pytest.mark.parametrize("chat", range(4))
def test_released_chats(chat):
    case = facts()["chat"][chat]
    history: list[tuple[str, str]] = []
    for turn in case["turns"]:
        response, returned = model().chat(turn["query"], list(history), images(*case["images"]), **SHORT)
        assert returned == [*history, (turn["query"], response)]
        # The release loses the last token of an answer that ends by its length (trap 7).
        assert response.startswith(turn["response"].rstrip("�"))
        assert response == vlm().processor.decode(turn["output_ids"]).strip()
        history.append((turn["query"], turn["response"]))
    assert history == [tuple(turn) for turn in case["history"]]


def test_conversations_are_answered_up_to_their_last_question():
    """As a training shows what it says: each with its own pictures, and what follows the question is not looked at."""
    case = next(one for one in facts()["chat"] if len(one["turns"]) > 1 and one["images"])
    queries = [turn["query"] for turn in case["turns"][:2]]
    (first, said), last = case["history"][0], queries[1]

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("user", "assistant")[at % 2], "value": text} for at, text in enumerate(texts)]

    pictures = images(*case["images"])
    one = turns(first, said, last, "anything")
    places = sum(text.count("<ImageHere>") for text in (first, last))
    own = pictures[:places]
    samples = {"conversations": [turns("Hello!", "Hi."), one], "image": own if places else None}
    answers = model().generate(samples, **SHORT)
    assert answers[0] == model().chat("Hello!", [], None, **SHORT)[0]
    assert answers[1] == model().chat(last, [(first, said)], own if places else None, append_history=False, **SHORT)[0]


def test_the_history_is_the_callers():
    history = [("Hello!", "Hi.")]
    _, returned = model().chat("And?", history, None, append_history=False, **SHORT)
    assert returned is history
    assert len(history) == 1
    model().chat("And?", history, None, **SHORT)
    assert len(history) == 2
    assert model().chat("And?", None, None, system="Be brief.", **SHORT)[1][0][0] == "And?"


def test_a_window_drops_images_with_their_turns():
    """Trap 6."""
    made = load()
    made.processor.max_window_size = 40
    history = [("<Img><ImageHere></Img>q1", "a1")]
    cut, _ = made.chat("<Img><ImageHere></Img>q2", list(history), images(0, 2), **SHORT)
    alone, _ = made.chat("<Img><ImageHere></Img>q2", [], images(2), **SHORT)
    assert cut == alone


def test_generate():
    case = facts()["generate"]
    assert model().generate({"image": images(*case["images"]), "text": case["text"]}, **SHORT) == case["output"]
    config = GenerationConfig(max_new_tokens=14, do_sample=False, eos_token_id=1)
    assert model().generate({"image": images(0), "text": case["text"]}, generation_config=config) == case["output"]
    tokens = model().generate({"image": images(0), "text": case["text"]}, chat=True, **SHORT)
    assert tokens.shape == (1, 14)


def test_two_texts_equal_two_single_ones():
    """Trap 8: the release fails."""
    first = facts()["generate"]["text"]
    second = first.replace("<Img><ImageHere></Img> Describe.", "<ImageHere> and <ImageHere>, what is different?")
    both = model().generate({"image": images(0, 1, 2), "text": [first, second]}, **SHORT)
    assert both == [
        *model().generate({"image": images(0), "text": first}, **SHORT),
        *model().generate({"image": images(1, 2), "text": second}, **SHORT),
    ]


def test_training():
    order = [index for row in prompts()["conversation_images"] for index in row]
    made = load(max_txt_len=96).train()
    assert not made.network.qformer.training
    loss = made({"conversations": prompts()["conversations_train"], "image": images(*order)})["loss"]
    torch.testing.assert_close(loss[None], expected()["forward.loss"], rtol=0.0, atol=MINIGPT4_QWEN)
    loss.backward()
    trained = [name for name, parameter in made.network.named_parameters() if parameter.grad is not None]
    assert trained == ["projector.weight", "projector.bias"]
    batch = made.preprocess(prompts()["conversations_train"], 96)
    assert torch.equal(batch["labels"], expected()["preprocess_train.labels"])
    torch.testing.assert_close(
        made.encode_image(images(0, 1, 2)), expected()["encode_image"], rtol=0.0, atol=MINIGPT4_QWEN
    )
    open_parts = load(freeze_llm=False, freeze_qformer=False, unfreeze_pos_embed=True).network
    assert open_parts.lm_head.weight.requires_grad
    assert open_parts.vision_tower.post_layernorm.weight.requires_grad
    assert open_parts.vision_tower.embeddings.position_embedding.requires_grad
    assert not open_parts.vision_tower.embeddings.class_embedding.requires_grad


def test_folders(tmp_path):
    whole = load(side_by_side(tmp_path / "release"))
    names = shared_network().state_dict()
    assert all(torch.equal(tensor, names[name]) for name, tensor in whole.network.state_dict().items())
    whole.network.save_pretrained(tmp_path / "saved")
    whole.processor.save_pretrained(tmp_path / "saved")
    again, pictures, texts = load_model_and_preprocess(
        "minigpt4qwen", "qwen14b_chat", True, checkpoint=tmp_path / "saved"
    )
    query = facts()["chat"][0]["turns"][0]["query"]
    assert again.chat(query, [], images(0), **SHORT)[0] == model().chat(query, [], images(0), **SHORT)[0]
    from PIL import Image

    with Image.open(CHECKPOINT.parent / "inputs/img0.png") as picture:
        assert torch.equal(pictures["eval"](picture), images(0)[0])
    assert texts["eval"]("as it is") == "as it is"


def test_llm_device_map(monkeypatch):
    case = facts()["generate"]
    answers = load(llm_device_map="auto").generate({"image": images(0), "text": case["text"]}, **SHORT)
    assert answers == case["output"]
    with pytest.raises(ConfigError, match="llm_device_map='gpu' was asked"):
        load(llm_device_map="gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"2 GPUs are there.*lavish\.load"):
        load(llm_device_map="auto")


def test_a_checkpoint_later(tmp_path):
    made = load()
    other = {"llm_proj.weight": torch.ones(64, 48), "llm_proj.bias": torch.zeros(64)}
    torch.save({"model": other, "epoch": 3}, tmp_path / "checkpoint_3.pth")
    made.load_checkpoint(tmp_path / "checkpoint_3.pth")
    assert torch.equal(made.network.projector.weight, other["llm_proj.weight"])
    ones = {"llm_proj.bias": torch.ones(64)}
    for wrong, error, words in (
        ({**ones, "stray": torch.ones(1), "strays": torch.ones(1)}, UnexpectedKeys, "2 of 3 tensors .* first 'stray'"),
        ({**ones, "llm_proj.weight": torch.ones(3, 3)}, ShapeMismatch, r"weight' is \(3, 3\), not \(64, 48\)"),
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(error, match=words):
            made.load_checkpoint(tmp_path / "wrong.pth")
        assert torch.equal(made.network.projector.bias, other["llm_proj.bias"])


def test_wrong_calls():
    with pytest.raises(ConfigError, match="on no hub"):
        load_model("minigpt4qwen", "qwen7b_chat")
    with pytest.raises(ConfigError, match="Did you mean 'llm_device_map'"):
        load(llm_device_maps="cpu")
    with pytest.raises(ConfigError, match="no model type 'qwen72b'"):
        load_model("minigpt4qwen", "qwen72b", checkpoint=TRAINED)
    for call in (
        lambda: model().chat("<ImageHere>", [], None),
        lambda: model().chat("What?", [], images(0)),
        lambda: model().generate({"image": images(0, 1), "text": "<ImageHere>"}),
        lambda: model()({"conversations": prompts()["conversations_train"], "image": images(0)}),
    ):
        with pytest.raises(PromptError, match=r"place\(s\) <ImageHere>"):
            call()


def test_calls_without_what_they_need():
    picture = Image.new("RGB", (8, 8))
    for call in (lambda: model().chat("<ImageHere> x", [], picture), lambda: model().chat("x", [], [picture])):
        with pytest.raises(DataError, match=r"a tensor \(images, 3, S, S\), not .*; the processor makes it"):
            call()
    with pytest.raises(DataError, match=r"not \(3, \d+, \d+\); add the batch: image\.unsqueeze\(0\)"):
        model().chat("<ImageHere> x", [], images(0)[0])
    for history in ("abc", ["abc"], [("one", None)]):
        with pytest.raises(PromptError, match=r"a list of \(question, answer\)"):
            model().chat("hi", history, None)
    with pytest.raises(DataError, match="have no 'text'; they have image"):
        model().generate({"image": images(0)})
    with pytest.raises(DataError, match="have no 'conversations'; they have image"):
        model()({"image": images(0)})
    with pytest.raises(DataError, match="a dict with 'text', not a Tensor"):
        model().generate(images(0))
    with pytest.raises(PromptError, match="one or more conversations"):
        model()({"image": images(0), "conversations": []})
    for conversations in ([3], [["hi"]], ["hi"]):
        with pytest.raises(PromptError, match=r"Sample 0: a (turn must|conversation is)"):
            model()({"image": images(0), "conversations": conversations})
