"""GLM-4V-9B: tokenizer, template, pixels, labels, text, against the golden fixture."""

import json
import shutil

import numpy as np
import pytest
import torch
from glm4v_fixture import (
    ASSISTANT,
    BOI,
    CASES,
    CHECKPOINT,
    EOI,
    IMAGE_CASES,
    INPUTS,
    NUM_PATCHES,
    PAD,
    ROOT,
    USER,
    config,
    conversations,
    expand,
    expected,
    expected_json,
    finetune_samples,
    shared_network,
)
from PIL import Image
from tolerance import PIXELS

from lavish.common.errors import CheckpointError, ConfigError, MediaError, PromptError
from lavish.inference.streaming import TextStream
from lavish.models.glm4v_9b import tokenizer as glm_tokenizer
from lavish.models.glm4v_9b.processor import RELEASE_TRAIN_TOKENS, Glm4v9bProcessor
from lavish.models.glm4v_9b.tokenizer import SPECIAL_TOKENS, ChatGLM4Tokenizer
from lavish.processors.tokenizers import encode_plain


@pytest.fixture(scope="module")
def processor():
    return Glm4v9bProcessor.from_pretrained(CHECKPOINT)


# Tokenizer


def check_table(tokenizer):
    for row in expected_json()["tokenizer"]:
        assert tokenizer.encode(row["text"]) == row["encode"]
        assert tokenizer.encode(row["text"], add_special_tokens=False) == row["encode_no_special"]
        assert encode_plain(tokenizer, row["text"]) == row["bpe_only"]
        assert tokenizer.decode(row["encode_no_special"]) == row["decode"]
        assert tokenizer.decode(row["bpe_only"], skip_special_tokens=True) == row["text"]
    assert (len(tokenizer), tokenizer.vocab_size) == (514, 500)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.padding_side) == (500, 500, "left")


def test_tokenizer_is_the_release_s(processor, tmp_path):
    check_table(processor.tokenizer)
    processor.tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    again = glm_tokenizer.load(tmp_path)
    assert type(again) is ChatGLM4Tokenizer
    check_table(again)


def test_tokenizer_without_its_config(tmp_path):
    """The special tokens follow the ranks in the released order."""
    shutil.copy(CHECKPOINT / "tokenizer.model", tmp_path)
    tokenizer = glm_tokenizer.load(tmp_path)
    check_table(tokenizer)
    assert [tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == list(range(500, 514))


def test_special_ids_of_the_fixture(processor):
    for token, token_id in expected_json()["special_ids"].items():
        assert processor.tokenizer.convert_tokens_to_ids(token) == token_id


def test_ids_without_text_and_half_characters(processor):
    ids = encode_plain(processor.tokenizer, "🙂")
    assert processor.decode([639, *ids[:2], 515]) == "�"
    assert processor.decode([600, *ids, 500]) == "🙂"
    assert processor.tokenizer.decode(507) == "<|user|>"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer; looked for tokenizer.model and tokenizer.json, found an empty folder"),
        ({"tokenizer.model": "IQ== 0\nIg==\n"}, "line 2: expected 'base64 rank'"),
        ({"tokenizer.model": "IQ== 0\nIg== 7\n"}, "the 2 ranks are not 0 to 1"),
        (
            {
                "tokenizer.model": "IQ== 0\n",
                "tokenizer_config.json": '{"added_tokens_decoder": {"5": {"content": "<a>"}}}',
            },
            "1 ranks, so the 1 special tokens have the ids 1 to 1; they are given as 5 to 5",
        ),
        (
            {
                "tokenizer.model": "IQ== 0\n",
                "tokenizer_config.json": '{"added_tokens_decoder": {"5": {"text": "<a>"}}}',
            },
            "added_tokens_decoder holds '5'",
        ),
    ],
)
def test_damaged_tokenizers(tmp_path, files, says):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=says):
        glm_tokenizer.load(tmp_path)


def test_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(ConfigError, match=r"has no \[gMASK\]: it belongs to another model"):
        Glm4v9bProcessor.from_pretrained(CHECKPOINT, tokenizer=ROOT.parent / "cogvlm2/open/checkpoint")
    tokenizer = glm_tokenizer.load(CHECKPOINT)
    with pytest.raises(ConfigError, match=r"id of <\|begin_of_image\|> is 510 and the model's is 33"):
        Glm4v9bProcessor.from_config(config(boi_token_id=33), tokenizer)
    shutil.copytree(CHECKPOINT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    fields = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**fields, "image_size": 1120}))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json says image_size 1120 and config.json 84"):
        Glm4v9bProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json and no processor_config\.json"):
        Glm4v9bProcessor.from_pretrained(tmp_path)


# Template


@pytest.mark.parametrize("case", CASES)
def test_ids_text_and_pixels(processor, case):
    messages, wanted = conversations()[case], expected_json()["cases"][case]
    batch = processor.apply_chat_template(messages)
    ids = expand(wanted["input_ids"])
    assert batch["input_ids"].tolist() == [ids]
    assert batch["attention_mask"].tolist() == [[1] * len(ids)]
    assert torch.equal(batch["token_type_ids"] == 1, shared_network().image_slots(batch["input_ids"]))
    if case in IMAGE_CASES:
        torch.testing.assert_close(batch["pixel_values"], expected()[f"{case}.images"], **PIXELS)
        assert processor.num_image_tokens == NUM_PATCHES + 2
    else:
        assert "pixel_values" not in batch
    assert processor.apply_chat_template(messages, tokenize=False) == wanted["prompt_text_tokenize_false"]
    without = processor.apply_chat_template(messages, add_generation_prompt=False, return_tensors=None)
    assert without["input_ids"] == expand(wanted["no_generation_prompt"])
    assert processor.apply_chat_template(messages, return_dict=False).tolist() == [ids]


def test_left_padded_batch(processor):
    batch = processor.apply_chat_template([conversations()["multi_turn"], conversations()["single_image"]])
    wanted = expected()["batch_left_padded.input_ids"].tolist()
    ids = batch["input_ids"].tolist()
    assert ids[0] == expand(wanted[0])
    assert ids[1] == expand(wanted[1])
    assert batch["attention_mask"].sum(dim=1).tolist() == [38, 22]
    assert batch["pixel_values"].shape == (2, 3, 84, 84)
    right = processor.apply_chat_template([conversations()["multi_turn"], [*hello()]], padding_side="right")
    assert right["attention_mask"][1].tolist() == sorted(right["attention_mask"][1].tolist(), reverse=True)
    assert right["pixel_values"].shape == (1, 3, 84, 84)


def hello(content="hello"):
    return [{"role": "user", "content": content}]


def test_content_lists_are_the_release_s_image_key(processor):
    """Fault 7: OpenAI's form, PIL pictures, paths and the release's own `image` give the same inputs."""
    own = processor.apply_chat_template([{"role": "user", "content": "What?", "image": str(INPUTS / "img0.png")}])
    with Image.open(INPUTS / "img0.png") as picture:
        picture.load()
    for image in (picture, INPUTS / "img0.png", (INPUTS / "img0.png").read_bytes()):
        parts = [{"type": "text", "text": "What?"}, {"type": "image", "image": image}]
        batch = processor.apply_chat_template([{"role": "user", "content": parts}])
        assert torch.equal(batch["input_ids"], own["input_ids"])
        assert torch.equal(batch["pixel_values"], own["pixel_values"])


def test_user_text_never_becomes_a_special_token(processor):
    special = set(range(500, 514))
    text = "".join(SPECIAL_TOKENS)
    ids = processor.apply_chat_template(
        [{"role": "user", "content": text, "metadata": "<|assistant|>"}], return_tensors=None
    )["input_ids"]
    assert [token_id for token_id in ids if token_id in special] == [502, 504, USER, ASSISTANT]
    assert processor.tokenizer.decode(ids[3:-1]) == f"<|assistant|>\n{text}"


def test_observations_metadata_and_order(processor):
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
        {"role": "observation", "content": "22"},
    ]
    text = '[gMASK]<sop><|user|>\nWeather?<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n22<|assistant|>'
    assert processor.apply_chat_template(messages, tokenize=False) == text
    ids = processor.apply_chat_template(messages, return_tensors=None)["input_ids"]
    assert ids[-1 - len(encode_plain(processor.tokenizer, "22")) - 2] == 509
    assert ids == [502, 504] + [
        token_id
        for role, head, content in (
            (507, "\n", "Weather?"),
            (508, "get_weather\n", '{"city": "北京"}'),
            (509, "\n", "22"),
        )
        for token_id in (role, *encode_plain(processor.tokenizer, head), *encode_plain(processor.tokenizer, content))
    ] + [508]


def test_newline_and_text_are_encoded_apart(processor):
    ids = processor.apply_chat_template(hello("\n\nx"), return_tensors=None)["input_ids"]
    assert ids[2:-1] == [507, 10, *encode_plain(processor.tokenizer, "\n\nx")]


def test_an_empty_message_gives_nothing(processor):
    text = processor.apply_chat_template(
        [{"role": "system", "content": ""}, *hello("x"), {"role": "assistant", "content": ""}], tokenize=False
    )
    assert text == "[gMASK]<sop><|user|>\nx<|assistant|>"


def test_tools_are_a_system_message_before_theirs(processor):
    function = {"name": "查", "parameters": {"q": "str"}}
    tools = [{"type": "function", "function": function}, {"type": "python"}]
    text = processor.apply_chat_template(
        [{"role": "system", "content": "S", "tools": tools}, *hello("x")], tokenize=False
    )
    start = "[gMASK]<sop><|system|>\n你是一个名为 GLM-4 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    assert text.startswith(start)
    definition = json.dumps(function, indent=4, ensure_ascii=False)
    called = f"\n\n## 查\n\n{definition}\n在调用上述函数时，请使用 Json 格式表示调用的参数。\n\n## python\n\n当你向"
    assert called in text
    assert text.endswith("这些在线内容的访问将不会成功。<|system|>\nS<|user|>\nx<|assistant|>")
    for kind, end in (("simple_browser", "再次使用 `search` 进行搜索。"), ("cogview", "并遵循中国社会主义价值观。")):
        text = processor.apply_chat_template([{**hello("x")[0], "tools": [{"type": kind}]}], tokenize=False)
        assert f"## {kind}\n\n" in text
        assert text.endswith(f"{end}<|user|>\nx<|assistant|>")


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([{**hello()[0], "tools": [{"type": "pyhton"}]}], "Message 0, tool 0: the type is 'pyhton'; .* 'python'"),
        ([{**hello()[0], "tools": [{"type": "function"}]}], "Message 0, tool 0: a function needs"),
        ([{**hello()[0], "tools": "python"}], "Message 0: tools is 'python' and must be a list"),
        (
            [{**hello()[0], "tools": [{"type": "function", "function": {"name": "f", "x": {1}}}]}],
            "'f' cannot be written as JSON",
        ),
        ([{**hello()[0], "metadata": 3}], "Message 0: metadata is 3 and must be a string"),
        ([*hello(), {"role": "tool", "content": "22"}], "Message 1 has role 'tool'; GLM-4's name .* 'observation'"),
        ([{"role": "asistant", "content": "x"}], "known roles are system, user, assistant, observation"),
        ([{"role": "user"}], "Message 0 has no 'content'"),
        ([], "messages is empty"),
        ("hello", "messages must be a list"),
        ([{"role": "user", "content": ""}], "The prompt is empty: no text and no image"),
        ([*hello(), {"role": "assistant", "content": "x"}], "ends with an answer, so there is nothing to generate"),
        ([{"role": "assistant", "content": "x", "image": "a.png"}], "role 'assistant' and holds an image"),
        (
            [{"role": "observation", "content": [{"type": "image", "image": "a.png"}]}],
            "role 'observation' and holds an image",
        ),
        ([{"role": "user", "content": [{"type": "picture"}]}], "unknown type 'picture'"),
    ],
)
def test_messages_that_make_no_prompt(processor, messages, says):
    with pytest.raises(PromptError, match=says):
        processor.apply_chat_template(messages)


def test_two_images(processor):
    """Fault 6: a typed error with the limit, in one message or in two turns."""
    image = {"type": "image", "image": str(INPUTS / "img0.png")}
    for messages in (
        [{"role": "user", "content": [image, image]}],
        [
            {"role": "user", "content": [image]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": [image]},
        ],
    ):
        with pytest.raises(PromptError, match=r"holds 2 images \(messages 0, .\); GLM-4V-9B takes one, in any turn"):
            processor.apply_chat_template(messages)


def test_wrong_options(processor):
    for argument, says in (
        ({"chat_template": "vqa"}, "GLM-4V-9B has one template, 'chat'"),
        ({"compat": "lavis"}, "use None or 'release'"),
        ({"padding_side": "middle"}, "use 'left'"),
        ({"return_tensors": "tf"}, "use 'pt', 'np' or None"),
    ):
        with pytest.raises(PromptError, match=says):
            processor.apply_chat_template(hello(), **argument)
    with pytest.raises(PromptError, match="Conversation 1 of 2: messages is empty"):
        processor.apply_chat_template([hello(), []])
    with pytest.raises(PromptError, match="answers conversations only"):
        processor(text="hello")
    with pytest.raises(MediaError):
        processor.apply_chat_template([{"role": "user", "content": "x", "image": "nowhere.png"}])
    assert isinstance(processor.apply_chat_template(hello(), return_tensors="np")["input_ids"], np.ndarray)


def test_pixels_of_every_kind_of_picture(processor):
    """RGBA loses its alpha, grey becomes RGB; tall and wide pictures become squares."""
    names = {"single_image": "img0.png", "system_image": "img1.png", "empty_text_image": "img2.png"}
    for case, name in names.items():
        pixels = processor.pixel_values(INPUTS / name)
        torch.testing.assert_close(pixels, expected()[f"{case}.images"][0], **PIXELS)
    with Image.open(INPUTS / "img0.png") as picture:
        grey = picture.convert("L")
    assert processor.pixel_values(grey).shape == (3, 84, 84)


def test_save_and_load(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    again = Glm4v9bProcessor.from_pretrained(tmp_path)
    messages = conversations()["multi_turn"]
    one, other = processor.apply_chat_template(messages), again.apply_chat_template(messages)
    assert all(torch.equal(one[name], other[name]) for name in one)


# Labels


@pytest.mark.parametrize("index", [0, 1])
def test_labels_of_the_release(processor, index):
    batch = processor.apply_chat_template(finetune_samples()[index], return_labels=True, compat="release")
    wanted = expected_json()["finetune"][index]
    at = wanted["input_ids"].index(BOI)
    labels = wanted["labels"]
    assert batch["input_ids"].tolist() == [expand(wanted["input_ids"])]
    assert batch["labels"].tolist() == [labels[: at + 1] + [-100] * NUM_PATCHES + labels[at + 2 :]]
    if index == 1:  # no picture: the release's black one
        levels = batch["pixel_values"][0].flatten(1)
        assert (levels == levels[:, :1]).all()


def test_labels_teach_to_stop(processor):
    """The corrected mask: the release's targets, and the token that ends each answer."""
    release = processor.apply_chat_template(finetune_samples()[0], return_labels=True, compat="release")
    own = processor.apply_chat_template(finetune_samples()[0], return_labels=True)
    assert torch.equal(own["input_ids"], release["input_ids"])
    added = (own["labels"] != release["labels"]).nonzero()[:, 1].tolist()
    ids = own["input_ids"][0].tolist()
    assert [ids[at] for at in added] == [USER, USER]
    assert [int(own["labels"][0, at]) for at in added] == [USER, USER]
    assert added[-1] == len(ids) - 1
    text_only = processor.apply_chat_template(finetune_samples()[1], return_labels=True)
    assert "pixel_values" not in text_only
    assert BOI not in text_only["input_ids"][0]


def test_an_answer_may_end_with_an_observation(processor):
    messages = [
        *hello("x"),
        {"role": "assistant", "metadata": "f", "content": "{}"},
        {"role": "observation", "content": "1"},
        {"role": "assistant", "content": "one"},
        {"role": "system", "content": "s"},
    ]
    labels = processor.apply_chat_template(messages, return_labels=True, return_tensors=None)["labels"]
    kept = [token_id for token_id in labels if token_id != -100]
    text = lambda x: encode_plain(processor.tokenizer, x)  # noqa: E731
    assert kept == [508, *text("f\n"), *text("{}"), 509, 508, *text("\n"), *text("one")]


def test_what_cannot_be_trained(processor):
    with pytest.raises(PromptError, match="needs an answer to learn"):
        processor.apply_chat_template(hello(), return_labels=True)
    late = [
        *hello(),
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "", "image": INPUTS / "img0.png"},
    ]
    with pytest.raises(PromptError, match="takes one"):
        processor.apply_chat_template(late, return_labels=True, compat="release")
    processor.apply_chat_template(late, return_labels=True)


def test_the_release_cuts_at_1024_before_it_expands(processor):
    answer = {"role": "assistant", "content": "a " * 3000}
    image = {"role": "user", "content": "x", "image": str(INPUTS / "img0.png")}
    batch = processor.apply_chat_template([image, answer], return_labels=True, compat="release")
    assert batch["input_ids"].shape[1] == batch["labels"].shape[1] == RELEASE_TRAIN_TOKENS - 3 + NUM_PATCHES + 2
    whole = processor.apply_chat_template([image, answer], return_labels=True)
    assert whole["input_ids"].shape[1] > 3000
    # [gMASK] <sop> <|user|> metadata newline: the image stands at 1022 of 1024.
    late = {**image, "metadata": "1 " * 509}
    row = processor.apply_chat_template(late and [late, answer], return_labels=True)
    at = row["input_ids"][0].tolist().index(BOI)
    late["metadata"] += "1" * (1022 - at)
    with pytest.raises(PromptError, match=r"cuts a sample at 1024 tokens, and the image .* stands at 1022 to 1024"):
        processor.apply_chat_template([late, answer], return_labels=True, compat="release")


def test_evaluation_prompts_are_prefixes(processor):
    """The release's evaluation takes the ids up to each `<|assistant|>`."""
    found = []
    for sample in finetune_samples():
        for index, message in enumerate(sample):
            if message["role"] == "assistant":
                prompt = sample[:index]
                if "image" not in prompt[0]:
                    prompt = [{**prompt[0], "image": Image.new("RGB", (224, 224))}, *prompt[1:]]
                found.append(processor.apply_chat_template(prompt, return_tensors=None)["input_ids"])
    wanted = expected_json()["finetune_eval_segments"]["input_ids"]
    assert found == [expand(ids) for ids in wanted]


# Text


@pytest.mark.parametrize("case", CASES)
def test_generated_text(processor, case):
    wanted = expected_json()["cases"][case]
    for ids, text in zip(wanted["generate"], wanted["generate_text"], strict=True):
        assert processor.decode(ids) == text
        assert processor.batch_decode(torch.tensor([ids])) == [text]


def test_the_first_newline_is_the_template_s(processor):
    encode = lambda text: encode_plain(processor.tokenizer, text)  # noqa: E731
    assert processor.decode([10, *encode("Hi\n")]) == "Hi\n"
    assert processor.decode([10, *encode("\nHi")]) == "\nHi"
    assert processor.decode([10, *encode("Hi"), USER]) == "Hi"
    assert processor.tokenizer.decode([10, *encode("Hi")]) == "\nHi"
    assert processor.decode([ASSISTANT, 10, *encode("Hi")]) == "\nHi"  # a prompt, not an answer
    assert processor.decode([10, *encode("Hi"), USER], skip_special_tokens=False) == "\nHi <|user|>"


@pytest.mark.parametrize(
    "text", ["\nHi", "\n\nHi\n\nthere\n", "\n", "", "Hi\n\n\nx", "\n🙂\n🙂é\n", "\n 图片中\n有一只猫。\n\n"]
)
def test_streamed_text_is_the_whole_text(processor, text):
    for ids in (encode_plain(processor.tokenizer, text), list(text.encode()), [600, *text.encode(), USER]):
        stream = TextStream(processor.decode)
        pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
        assert "".join(pieces) == processor.decode(ids)
    assert not "".join(pieces).startswith("\n") or text.startswith("\n\n")


def test_what_is_no_id(processor):
    for wrong in (-100, "5", 2**31, None, True):
        with pytest.raises(PromptError, match="decode takes token ids"):
            processor.decode([3, wrong])
    with pytest.raises(PromptError, match="batch_decode takes rows"):
        processor.batch_decode("abc")


def test_slots_hold_pad_ids_between_the_edges(processor):
    ids = processor.apply_chat_template(conversations()["single_image"], return_tensors=None)["input_ids"]
    at = ids.index(BOI)
    assert ids[at : at + NUM_PATCHES + 2] == [BOI, *[PAD] * NUM_PATCHES, EOI]


def test_a_key_that_no_template_reads(processor):
    with pytest.raises(PromptError, match="Message 0 has the key 'picture', which this model does not read"):
        processor.apply_chat_template([{"role": "user", "content": "Hi", "picture": "a.png"}])
