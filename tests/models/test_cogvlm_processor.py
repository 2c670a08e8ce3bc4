"""CogVLM's processor against the golden fixtures of both versions: prompts, ids, pixels, batches, labels, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor, BatchFeature

from lavish.common.errors import CheckpointError, ConfigError, MediaError, PromptError
from lavish.common.media import MediaLimits
from lavish.common.messages import normalize
from lavish.models.cogvlm.config import CogVLMConfig
from lavish.models.cogvlm.processor import TEMPLATES, CogVLMProcessor
from lavish.processors.tokenizers import load_tokenizer

FIXTURES = Path(__file__).parent.parent / "fixtures"
FAMILIES = ("cogvlm", "cogvlm2")
TENSORS = ("input_ids", "token_type_ids", "attention_mask")
QUESTION = "Describe this image in detail."


class Golden:
    """One fixture: its expected values and its prompts as chat messages."""

    def __init__(self, family: str):
        self.folder = FIXTURES / family / "open"
        self.expected = json.loads((self.folder / "expected.json").read_text(encoding="utf-8"))
        self.tensors = load_file(self.folder / "expected.safetensors")
        inputs = json.loads((self.folder / "inputs/prompts.json").read_text(encoding="utf-8"))
        self.prompts = {prompt["id"]: prompt for prompt in inputs["prompts"]}
        self.answers, self.batch = inputs["answers"], inputs["batch"]
        self.processor = CogVLMProcessor.from_pretrained(self.folder / "checkpoint")

    def picture(self, name: str = "landscape.png") -> Path:
        return self.folder / "inputs" / name

    def messages(self, name: str, answer: str | None = None) -> list[dict]:
        prompt = self.prompts[name]
        found = []
        for question, reply in prompt["history"]:
            found += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        content = [{"type": "text", "text": prompt["query"]}]
        if prompt["image"] is not None:
            content.insert(0, {"type": "image", "image": self.picture(prompt["image"])})
        found.append({"role": "user", "content": content})
        return found if answer is None else [*found, {"role": "assistant", "content": answer}]


GOLDEN = {family: Golden(family) for family in FAMILIES}
CASES = [(family, name) for family in FAMILIES for name in GOLDEN[family].prompts]


@pytest.fixture(params=FAMILIES)
def golden(request):
    return GOLDEN[request.param]


@pytest.fixture
def processor(golden):
    return golden.processor


def user(text: str, *pictures) -> dict:
    parts = [{"type": "image", "image": picture} for picture in pictures]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


# Parity with the release


@pytest.mark.parametrize(("family", "name"), CASES)
def test_prompt_and_ids(family, name):
    golden = GOLDEN[family]
    expected, template = golden.expected[name], golden.prompts[name]["template_version"]
    messages = golden.messages(name)
    assert golden.processor.apply_chat_template(messages, template, tokenize=False) == expected["prompt"]
    inputs = golden.processor.apply_chat_template(messages, template)
    assert isinstance(inputs, BatchFeature)
    for key in TENSORS:
        assert inputs[key].dtype == torch.int64
        assert inputs[key].tolist() == [expected[key]]
    assert "labels" not in inputs
    picture = golden.prompts[name]["image"]
    if picture is None:
        assert "pixel_values" not in inputs
    else:
        assert torch.equal(inputs["pixel_values"], golden.tensors[f"pixels.{picture}"][None])


@pytest.mark.parametrize(("family", "name"), CASES)
def test_text_of_the_greedy_ids(family, name):
    golden = GOLDEN[family]
    ids, expected = golden.tensors[f"{name}.greedy_ids"], golden.expected[name]
    assert golden.processor.decode(ids) == expected["greedy_text_skip_special"]
    assert golden.processor.decode(ids, skip_special_tokens=False) == expected["greedy_text"]
    assert golden.processor.decode(ids.tolist()) == expected["greedy_text_skip_special"]


def test_left_padded_batch(golden):
    expected = golden.expected["batch_left"]
    # The fixture pads rows of two templates together; one call renders one, so the words of `vqa` come as text.
    conversations = [
        [user(golden.expected[name]["prompt"], golden.picture(golden.prompts[name]["image"]))] for name in golden.batch
    ]
    inputs = golden.processor.apply_chat_template(conversations, "base")
    for key in TENSORS:
        assert inputs[key].tolist() == expected[key]
    pictures = [golden.tensors[f"pixels.{golden.prompts[name]['image']}"] for name in golden.batch]
    assert torch.equal(inputs["pixel_values"], torch.stack(pictures))


def test_train_batch(golden):
    expected = golden.expected["train"]
    conversations = [golden.messages(name, answer) for name, answer in golden.answers]
    for compat in (None, "release"):
        inputs = golden.processor.apply_chat_template(
            conversations, return_labels=True, padding_side="right", compat=compat
        )
        for key in (*TENSORS, "labels"):
            assert inputs[key].tolist() == expected[key]


def test_default_template_is_that_of_the_config(golden, tmp_path):
    messages = [user("Hello")]
    assert golden.processor.apply_chat_template(messages, tokenize=False) == "Question: Hello Answer:"
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copy(golden.folder / "checkpoint" / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "template_version": "base"}))
    assert CogVLMProcessor.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=False) == "Hello"


# Templates, turns, roles


@pytest.mark.parametrize(
    ("template", "single", "three_turns"),
    [
        ("chat", "Question: c Answer:", "Question: a Answer: 1\nQuestion: b Answer: 2\nQuestion: c Answer:"),
        (
            "vqa",
            "Question: c Short answer:",
            "Question: a Short answer: 1\nQuestion: b Short answer: 2\nQuestion: c Short answer:",
        ),
        ("base", "c", "c"),
        (
            "vicuna",
            f"{TEMPLATES['vicuna'].opening}USER: c ASSISTANT:",
            f"{TEMPLATES['vicuna'].opening}USER: a ASSISTANT: 1\nUSER: b ASSISTANT: 2\nUSER: c ASSISTANT:",
        ),
    ],
)
def test_templates(processor, template, single, three_turns):
    history = [user("a"), assistant("1"), user("b"), assistant("2")]
    assert processor.apply_chat_template([user("c")], template, tokenize=False) == single
    assert processor.apply_chat_template([*history, user("c")], template, tokenize=False) == three_turns


def test_vicuna_equals_the_demo_and_does_not_repeat():
    golden = GOLDEN["cogvlm"]
    two_turns = [user("Hello"), assistant("Hi!"), user("How are you?")]
    for name, messages in (("text_only_turn1", two_turns[:1]), ("text_only_turn2", two_turns)):
        inputs = golden.processor.apply_chat_template(messages, "vicuna")
        assert inputs["input_ids"].tolist() == [golden.expected[name]["input_ids"]]
    text = golden.processor.apply_chat_template(
        [*two_turns, assistant("Fine."), user("Good.")], "vicuna", tokenize=False
    )
    assert (
        text.count("Hello") == text.count("How are you?") == text.count("A chat between") == 1
    )  # the demo repeats them


def test_vicuna_takes_no_image(golden):
    with pytest.raises(PromptError, match="'vicuna' is for conversations without an image"):
        golden.processor.apply_chat_template([user("Hi", golden.picture())], "vicuna")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("chta", "Unknown template 'chta' .*known are chat, vqa, base, inst, vicuna. Did you mean 'chat'"),
        ("{{ x }}", "Unknown template"),
    ],
)
def test_unknown_template(processor, template, says):
    with pytest.raises(PromptError, match=says):
        processor.apply_chat_template([user("Hi")], template)


def test_the_picture_may_sit_in_any_turn_and_place(golden):
    picture = golden.picture()
    after = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": picture}]}
    first = [user("a", picture), assistant("1"), user("b")]
    expected = golden.processor.apply_chat_template(first)
    for messages in ([after, assistant("1"), user("b")], [user("a"), assistant("1"), user("b", picture)]):
        inputs = golden.processor.apply_chat_template(messages)
        for key in (*TENSORS, "pixel_values"):
            assert torch.equal(inputs[key], expected[key])
    base = golden.processor.apply_chat_template(first, "base")  # the history is dropped, its picture is not
    assert base["token_type_ids"].sum() == golden.processor.num_image_tokens
    assert golden.processor.apply_chat_template(first, "base", tokenize=False) == "b"


def test_system_text_goes_before_the_first_rendered_question(processor):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, user("a"), assistant("1"), user("b")]
    rendered = processor.apply_chat_template(messages, "chat", tokenize=False)
    assert rendered == "Question: Be brief. a Answer: 1\nQuestion: b Answer:"
    assert processor.apply_chat_template(messages, "base", tokenize=False) == "Be brief. b"
    empty = [{"role": "system", "content": ""}, user("a")]
    assert processor.apply_chat_template(empty, "chat", tokenize=False) == "Question: a Answer:"


def test_chinese_and_braces_are_text(processor):
    text = "图中有几只猫？{q} {} %s {0}"
    assert processor.apply_chat_template([user(text)], "chat", tokenize=False) == f"Question: {text} Answer:"


def test_without_generation_prompt(processor):
    assert (
        processor.apply_chat_template([user("a")], "chat", add_generation_prompt=False, tokenize=False) == "Question: a"
    )
    finished = [user("a"), assistant("1")]
    plain = processor.apply_chat_template(finished, add_generation_prompt=False)
    trained = processor.apply_chat_template(finished, return_labels=True)
    with pytest.raises(PromptError, match="ends with an answer, so there is nothing to generate"):
        processor.apply_chat_template(finished)
    assert plain["input_ids"][0, 0] == processor.bos_token_id
    assert trained["input_ids"][0, -1] == processor.eos_token_id


# Special strings (trap 13)


@pytest.mark.parametrize("template", ["chat", "vqa", "base"])
def test_special_strings_of_the_user_stay_text(processor, template):
    special = [
        processor.tokenizer.convert_ids_to_tokens(i)
        for i in (processor.bos_token_id, processor.eos_token_id, processor.pad_token_id)
    ]
    text = "".join(special) + "</s><s><unk><EOI><|end_of_text|><|eot_id|><|begin_of_text|>"
    control = set(processor.tokenizer.all_special_ids) | set(processor.tokenizer.added_tokens_decoder)
    inputs = processor.apply_chat_template([user(text), assistant(text), user(text)], template)
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == processor.bos_token_id
    assert not control & set(ids[1:])
    assert inputs["token_type_ids"].sum() == 0
    assert processor.decode(ids).count(text) == (1 if template == "base" else 3)
    trained = processor.apply_chat_template([user(text), assistant(text)], template, return_labels=True)
    assert not control & set(trained["input_ids"][0, 1:-1].tolist())


# Batches


def test_mixed_batch_both_sides(golden):
    processor = golden.processor
    conversations = [
        [user("Hello")],
        [user("Where is the small dog?", golden.picture("square.png"))],
        [user("图片里有什么？"), assistant("猫"), user("Is it red?", golden.picture("portrait.png"))],
    ]
    single = [processor.apply_chat_template(conversation) for conversation in conversations]
    width = max(row["input_ids"].shape[1] for row in single)
    for side in ("left", "right"):
        inputs = processor.apply_chat_template(conversations, padding_side=side)
        assert inputs["input_ids"].shape == (3, width)
        for index, row in enumerate(single):
            length = row["input_ids"].shape[1]
            real = slice(width - length, None) if side == "left" else slice(0, length)
            for key in TENSORS:
                assert torch.equal(inputs[key][index, real], row[key][0])
            padding = inputs["attention_mask"][index] == 0
            assert padding.sum() == width - length
            assert (inputs["input_ids"][index, padding] == processor.pad_token_id).all()
            assert (inputs["token_type_ids"][index, padding] == 0).all()
        # The pictures of the rows that have one, in their order: the text row leaves no gap.
        assert torch.equal(inputs["pixel_values"], torch.cat([single[1]["pixel_values"], single[2]["pixel_values"]]))


def test_batch_of_one_and_of_checked_messages(golden):
    messages = [user("Hi", golden.picture())]
    expected = golden.processor.apply_chat_template(messages)
    for form in ([messages], [normalize(messages)], normalize(messages)):
        inputs = golden.processor.apply_chat_template(form)
        for key in (*TENSORS, "pixel_values"):
            assert torch.equal(inputs[key], expected[key])
    assert golden.processor.apply_chat_template([messages], tokenize=False) == ["Question: Hi Answer:"]


def test_other_return_forms(golden):
    messages = [user("Hi", golden.picture())]
    expected = golden.processor.apply_chat_template(messages)
    assert torch.equal(golden.processor.apply_chat_template(messages, return_dict=False), expected["input_ids"])
    arrays = golden.processor.apply_chat_template(messages, return_tensors="np")
    assert isinstance(arrays["input_ids"], np.ndarray)
    assert arrays["pixel_values"].dtype == np.float32
    lists = golden.processor.apply_chat_template(messages, return_tensors=None)
    assert lists["input_ids"] == expected["input_ids"][0].tolist()
    nested = golden.processor.apply_chat_template([messages], return_tensors=None)
    assert nested["input_ids"] == expected["input_ids"].tolist()


def test_to_moves_the_batch(golden):
    inputs = golden.processor.apply_chat_template([user("Hi", golden.picture())]).to("cpu", dtype=torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_ids"].dtype == torch.int64


def test_plain_call_encodes_text_as_it_is(golden):
    processor = golden.processor
    prompt = golden.expected["vqa_image"]["prompt"]
    inputs = processor(images=golden.picture("portrait.png"), text=prompt)
    assert inputs["input_ids"].tolist() == [golden.expected["vqa_image"]["input_ids"]]
    batch = processor(images=[None, golden.picture()], text=["a", "b"])
    assert batch["token_type_ids"].sum(1).tolist() == [0, processor.num_image_tokens]
    with pytest.raises(PromptError, match="2 texts and 1 images"):
        processor(images=[golden.picture()], text=["a", "b"])
    with pytest.raises(PromptError, match="Give text="):
        processor(images=golden.picture())


# Labels


def test_every_assistant_turn_is_trained(golden):
    processor = golden.processor
    messages = [
        user("a?", golden.picture()),
        assistant("One."),
        user("图？"),
        assistant("二。"),
        user("c?"),
        assistant("Three."),
    ]
    inputs = processor.apply_chat_template(messages, "chat", return_labels=True)
    ids, labels = inputs["input_ids"][0], inputs["labels"][0]
    assert torch.equal(labels[labels != -100], ids[labels != -100])
    encode = processor.tokenizer.encode
    answers = [[*encode(text, add_special_tokens=False), processor.eos_token_id] for text in ("One.", "二。", "Three.")]
    assert labels[labels != -100].tolist() == [token for answer in answers for token in answer]
    bos, eos = (
        processor.decode([i], skip_special_tokens=False) for i in (processor.bos_token_id, processor.eos_token_id)
    )
    assert processor.show_labels(inputs) == (
        f"{bos}<image x{processor.num_image_tokens}>Question: a? Answer:«One.{eos}»"
        f"\\nQuestion: 图？ Answer:«二。{eos}»\\nQuestion: c? Answer:«Three.{eos}»"
    )


def test_compat_release_trains_the_last_turn_on_the_history_of_inference(golden):
    processor = golden.processor
    messages = golden.messages("chat_multiturn_image")
    prompt = processor.apply_chat_template(messages, "chat")["input_ids"][0].tolist()
    inputs = processor.apply_chat_template([*messages, assistant("Red.")], "chat", return_labels=True, compat="release")
    ids, labels = inputs["input_ids"][0].tolist(), inputs["labels"][0].tolist()
    assert ids[: len(prompt)] == prompt == golden.expected["chat_multiturn_image"]["input_ids"]
    assert labels == [-100] * len(prompt) + ids[len(prompt) :]
    assert processor.decode(ids[len(prompt) :]) == "Red."


def test_base_has_no_history_to_train(processor):
    messages = [user("a"), assistant("1"), user("b"), assistant("2")]
    with pytest.raises(PromptError, match="'base' has no history, so a conversation of 2 answers"):
        processor.apply_chat_template(messages, "base", return_labels=True)
    last = processor.apply_chat_template(messages, "base", return_labels=True, compat="release")
    alone = processor.apply_chat_template(messages[2:], "base", return_labels=True)
    assert torch.equal(last["labels"], alone["labels"])
    assert torch.equal(last["input_ids"], alone["input_ids"])


def test_show_labels_of_a_padded_batch(golden):
    processor = golden.processor
    conversations = [[user("a", golden.picture()), assistant("1")], [user("b\nc"), assistant("")]]
    inputs = processor.apply_chat_template(conversations, return_labels=True, padding_side="right")
    bos, eos = (
        processor.decode([i], skip_special_tokens=False) for i in (processor.bos_token_id, processor.eos_token_id)
    )
    first, second = processor.show_labels(inputs).split("\n")
    assert first == f"{bos}<image x{processor.num_image_tokens}>Question: a Answer:«1{eos}»"
    padding = int((inputs["attention_mask"][1] == 0).sum())
    assert second == f"{bos}Question: b\\nc Answer:«{eos}»<pad x{padding}>"
    unlabelled = processor.apply_chat_template([user("a")])
    with pytest.raises(PromptError, match="return_labels=True"):
        processor.show_labels(unlabelled)


# Bad input


def test_two_images(golden):
    picture = golden.picture()
    for messages in ([user("a", picture, picture)], [user("a", picture), assistant("1"), user("b", picture)]):
        for call in (golden.processor.apply_chat_template, golden.processor.image_digests):
            with pytest.raises(PromptError, match=r"holds 2 images \(messages 0, [02]\); CogVLM takes one"):
                call(messages)


def test_image_of_the_assistant(golden):
    answer = {"role": "assistant", "content": [{"type": "image", "image": golden.picture()}]}
    with pytest.raises(PromptError, match="images belong to user messages"):
        golden.processor.apply_chat_template([user("a"), answer, user("b")])


def test_empty_prompt(golden):
    processor = golden.processor
    inputs = processor.apply_chat_template([user("", golden.picture())], "base")
    assert inputs["input_ids"].tolist() == [golden.expected["base_image_empty"]["input_ids"]]
    for text in ("", "  \n"):
        with pytest.raises(PromptError, match="prompt is empty: no text and no image"):
            processor.apply_chat_template([user(text)])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"padding_side": "middle"}, "padding_side='middle'"),
        ({"return_tensors": "tf"}, "return_tensors='tf'"),
        ({"compat": "lavis"}, "compat='lavis'"),
        ({"return_labels": True}, "return_labels needs a conversation that ends with an answer"),
    ],
)
def test_wrong_options(processor, options, says):
    with pytest.raises(PromptError, match=says):
        processor.apply_chat_template([user("Hi")], **options)


def test_a_bad_conversation_of_a_batch_is_named(processor):
    with pytest.raises(PromptError, match="Conversation 1 of 2: Message 0 has role 'assistant'"):
        processor.apply_chat_template([[user("Hi")], [assistant("Hi")]])


def test_pictures_that_cannot_be_opened(processor, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no image")
    for name in ("empty.png", "text.png", "absent.png"):
        with pytest.raises(MediaError):
            processor.apply_chat_template([user("Hi", tmp_path / name)])


def test_what_may_be_opened_is_the_callers_choice(golden):
    messages = [user("Hi", str(golden.picture()))]
    url = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://example.org/a.png"}}]}]
    tiny = MediaLimits(max_pixels=10)
    for call in (golden.processor.apply_chat_template, golden.processor.image_digests, golden.processor.open_images):
        with pytest.raises(MediaError):
            call(messages, allow_paths=False)
        with pytest.raises(MediaError):
            call(url)
        with pytest.raises(MediaError):
            call(messages, limits=tiny)


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_pictures(processor, size):
    pixels = processor.pixel_values(Image.new("RGB", size, (200, 10, 60)))
    assert pixels.shape == (3, processor.image_size, processor.image_size)
    assert torch.isfinite(pixels).all()
    assert torch.equal(pixels, pixels[:, :1, :1].expand_as(pixels))


# Images by content


def test_digests_follow_the_content(golden, tmp_path):
    processor, picture = golden.processor, golden.picture()
    copy = tmp_path / "other name.png"
    shutil.copy(picture, copy)
    with Image.open(picture) as image:
        forms = [picture, copy, picture.read_bytes(), image.convert("RGB")]
    digests = {tuple(processor.image_digests([user("Hi", form)])) for form in forms}
    assert len(digests) == 1
    assert processor.image_digests([user("Hi")]) == []
    assert processor.image_digests([user("Hi", golden.picture("square.png"))]) not in [list(found) for found in digests]


def test_opened_messages_are_read_once(golden, tmp_path):
    copy = tmp_path / "a.png"
    shutil.copy(golden.picture(), copy)
    messages = [user("a", copy), assistant("1"), user("b")]
    expected = golden.processor.apply_chat_template(messages)
    digests = golden.processor.image_digests(messages)
    opened = golden.processor.open_images(messages)
    copy.unlink()
    assert golden.processor.image_digests(opened) == digests
    inputs = golden.processor.apply_chat_template(opened)
    for key in (*TENSORS, "pixel_values"):
        assert torch.equal(inputs[key], expected[key])


# Save and load


def test_save_and_load(golden, tmp_path):
    golden.processor.save_pretrained(tmp_path)
    again = CogVLMProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == golden.processor.to_dict()
    for name, prompt in golden.prompts.items():
        inputs = again.apply_chat_template(golden.messages(name), prompt["template_version"])
        assert inputs["input_ids"].tolist() == [golden.expected[name]["input_ids"]]
    again.save_pretrained(tmp_path)  # over itself
    assert CogVLMProcessor.from_pretrained(str(tmp_path)).to_dict() == again.to_dict()


def test_auto_processor_finds_a_saved_folder(golden, tmp_path):
    AutoProcessor.register(CogVLMConfig, CogVLMProcessor, exist_ok=True)
    golden.processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, CogVLMProcessor)
    assert again.to_dict() == golden.processor.to_dict()


def test_tokenizer_from_another_folder(golden, tmp_path):
    checkpoint, weights, tokenizer = golden.folder / "checkpoint", tmp_path / "weights", tmp_path / "tokenizer"
    weights.mkdir()
    tokenizer.mkdir()
    shutil.copy(checkpoint / "config.json", weights)
    for path in checkpoint.glob("*token*"):
        shutil.copy(path, tokenizer)
    with pytest.raises(CheckpointError, match=r"tokenizer=.*vicuna-7b-v1.5"):
        CogVLMProcessor.from_pretrained(weights)
    expected = golden.processor.apply_chat_template([user("Hello")])["input_ids"]
    for form in (tokenizer, str(tokenizer), load_tokenizer(tokenizer)):
        processor = CogVLMProcessor.from_pretrained(weights, tokenizer=form)
        assert torch.equal(processor.apply_chat_template([user("Hello")])["input_ids"], expected)


def test_tiktoken_model_alone(tmp_path):
    golden = GOLDEN["cogvlm2"]
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(golden.folder / "checkpoint" / name, tmp_path)
    processor = CogVLMProcessor.from_pretrained(tmp_path)
    for name, prompt in golden.prompts.items():
        inputs = processor.apply_chat_template(golden.messages(name), prompt["template_version"])
        assert inputs["input_ids"].tolist() == [golden.expected[name]["input_ids"]]


def test_tokenizer_of_another_model():
    v1, v2 = (GOLDEN[family].folder / "checkpoint" for family in FAMILIES)
    with pytest.raises(ConfigError, match=r"bos id is 1 .* the model's is 448 .*belongs to another model"):
        CogVLMProcessor.from_pretrained(v2, tokenizer=v1)


def test_folders_without_a_usable_config(golden, tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json and no processor_config.json"):
        CogVLMProcessor.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not valid JSON"):
        CogVLMProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"processor_config.json holds list and not an object"):
        CogVLMProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    config = json.loads((golden.folder / "checkpoint/config.json").read_text())
    del config["vision_config"]["image_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"vision_config.image_size"):
        CogVLMProcessor.from_pretrained(tmp_path)


def test_ids_come_from_the_config_and_the_tokenizer_is_left_alone():
    processor = GOLDEN["cogvlm2"].processor
    assert (processor.bos_token_id, processor.eos_token_id, processor.pad_token_id) == (448, 449, 450)
    assert processor.tokenizer.pad_token is None
    assert processor.num_image_tokens == 11
    assert GOLDEN["cogvlm"].processor.num_image_tokens == 18
