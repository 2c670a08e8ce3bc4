"""chat, stream and batch on the fixture checkpoints: the release's tokens, and everything around them."""

import threading

import pytest
import torch
from PIL import Image

from lavish.common.errors import ConfigError, MediaError, PromptError

ASK = [{"role": "user", "content": "Hello"}]


def ask(image, text="Describe this image in detail."):
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


def follow_up(messages, reply, question):
    return [*messages, {"role": "assistant", "content": reply.text}, {"role": "user", "content": question}]


# -- the release's tokens --------------------------------------------------------------------------------------------


def test_greedy_answers_are_the_release_s(release):
    for name, (messages, template) in release.prompts.items():
        reply = release.vlm().chat(messages, max_new_tokens=10, chat_template=template)
        assert reply.token_ids == release.greedy_ids[name], name
        assert reply.text == release.expected[name]["greedy_text_skip_special"], name
        assert reply.finish_reason == "length"
        assert reply.usage.prompt_tokens == len(release.expected[name]["input_ids"])
        assert (reply.usage.completion_tokens, reply.usage.cached_tokens) == (10, 0)


def test_one_vlm_answers_them_all_although_it_reuses_what_it_can(release):
    vlm = release.vlm()
    for _ in range(2):
        for name, (messages, template) in release.prompts.items():
            reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
            assert reply.token_ids == release.greedy_ids[name], name


def test_transformers_generate_gives_the_same_tokens(release):
    for name in ("chat_image", "chat_multiturn_image"):
        messages, template = release.prompts[name]
        inputs = release.loaded.processor.apply_chat_template(messages, chat_template=template)
        generated = release.loaded.model.generate(**inputs, max_new_tokens=10, do_sample=False)
        assert generated[0, inputs["input_ids"].shape[1] :].tolist() == release.greedy_ids[name]


# -- stream ----------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_stream_join_to_the_text_of_chat(release):
    vlm = release.vlm()
    for messages, template in release.prompts.values():
        stream = vlm.stream(messages, max_new_tokens=24, chat_template=template)
        pieces = list(stream)
        expected = release.vlm().chat(messages, max_new_tokens=24, chat_template=template)
        assert all(pieces)
        assert "".join(pieces) == expected.text == stream.reply.text
        assert stream.reply.token_ids == expected.token_ids


def test_a_stream_gives_text_before_it_ends(v2):
    messages, template = v2.prompts["chat_image"]
    stream = v2.vlm().stream(messages, max_new_tokens=200, chat_template=template)
    next(stream)
    assert stream.reply is None


def test_closing_a_stream_cancels_and_keeps_the_cache_usable(release):
    messages, template = release.prompts["chat_image"]
    vlm = release.vlm()
    whole = release.vlm().chat(messages, max_new_tokens=30, chat_template=template)
    stream = vlm.stream(messages, max_new_tokens=30, chat_template=template)
    next(stream)
    next(stream)
    stream.close()
    stream.close()
    assert stream.reply.finish_reason == "cancelled"
    assert whole.text.startswith(stream.reply.text.rstrip("�"))
    assert whole.token_ids[: len(stream.reply.token_ids)] == stream.reply.token_ids
    assert list(stream) == []
    again = vlm.chat(messages, max_new_tokens=30, chat_template=template)
    assert again.token_ids == whole.token_ids
    assert again.usage.cached_tokens > 0


def test_a_stream_closed_before_it_began(v2):
    vlm = v2.vlm()
    with vlm.stream(ASK, max_new_tokens=5) as stream:
        pass
    assert (stream.reply.text, stream.reply.token_ids, stream.reply.finish_reason) == ("", [], "cancelled")
    assert len(vlm.conversations) == 0


@pytest.mark.parametrize("at_pass", [0, 3])
def test_ctrl_c_in_the_middle_of_a_pass_leaves_a_clean_state(release, monkeypatch, at_pass):
    messages, template = release.prompts["chat_image"]
    vlm = release.vlm()
    layer, passes = vlm.model.model.layers[1], []
    layer_forward = layer.forward

    def interrupted(*args, **kwargs):
        passes.append(1)
        if len(passes) == at_pass + 1:
            raise KeyboardInterrupt  # layer 0 has put the token into its cache, layer 1 has not
        return layer_forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        stream = vlm.stream(messages, max_new_tokens=30, chat_template=template)
        with pytest.raises(KeyboardInterrupt):
            list(stream)
    assert stream.reply.finish_reason == "cancelled"
    assert len(stream.reply.token_ids) == at_pass
    reply = vlm.chat(messages, max_new_tokens=10, chat_template=template)
    assert reply.token_ids == release.greedy_ids["chat_image"]
    assert bool(reply.usage.cached_tokens) is (at_pass > 0)


# -- batch -----------------------------------------------------------------------------------------------------------


def test_a_batch_equals_the_release_s_left_padded_batch(release):
    names = release.expected["batch_left"]["items"]
    replies = release.vlm().batch([release.prompts[name][0] for name in names], max_new_tokens=10, chat_template="chat")
    # The fixture's batch holds a vqa prompt too; it is compared below, with its own template.
    for name, reply, expected in zip(names, replies, release.batch_left):
        if release.prompts[name][1] == "chat":
            assert reply.token_ids == expected, name


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_batch_equals_the_single_runs(release, batch_size):
    chosen = {n: m for n, (m, template) in release.prompts.items() if template in ("chat", None)}
    chosen["text"] = ASK
    chosen["long_text"] = [{"role": "user", "content": "Hello " * 40}]
    replies = release.vlm().batch(list(chosen.values()), batch_size=batch_size, max_new_tokens=25, chat_template="chat")
    for name, reply in zip(chosen, replies):
        single = release.vlm().chat(chosen[name], max_new_tokens=25, chat_template="chat")
        assert (reply.token_ids, reply.text, reply.finish_reason) == (single.token_ids, single.text, "length"), name
        assert reply.usage.prompt_tokens == single.usage.prompt_tokens


def test_rows_of_a_batch_end_on_their_own(v2):
    messages = [v2.prompts[name][0] for name in ("chat_image", "zh_image", "text_only_chat")]
    free = v2.vlm().batch(messages, max_new_tokens=10, chat_template="chat")
    eos = free[1].token_ids[3]  # ends the second row after four tokens
    vlm = v2.vlm(eos_token_ids=[eos])
    for reply, row in zip(vlm.batch(messages, max_new_tokens=10, chat_template="chat"), messages):
        single = v2.vlm(eos_token_ids=[eos]).chat(row, max_new_tokens=10, chat_template="chat")
        assert (reply.token_ids, reply.text, reply.finish_reason) == (
            single.token_ids,
            single.text,
            single.finish_reason,
        )


def test_a_sampled_batch_equals_the_single_runs(v2):
    messages = [v2.prompts[name][0] for name in ("chat_image", "zh_image", "text_only_chat")]
    options = {"temperature": 0.9, "top_p": 0.9, "seed": 11, "repetition_penalty": 1.2, "max_new_tokens": 12}
    replies = v2.vlm().batch(messages, chat_template="chat", **options)
    singles = [v2.vlm().chat(row, chat_template="chat", **options) for row in messages]
    assert [reply.token_ids for reply in replies] == [reply.token_ids for reply in singles]


def test_an_empty_batch_and_a_bad_row(v2):
    assert v2.vlm().batch([]) == []
    with pytest.raises(PromptError, match=r"Conversation 1 of 2: .*role"):
        v2.vlm().batch([ASK, [{"role": "robot", "content": "hi"}]])
    with pytest.raises(ConfigError, match="batch_size must be"):
        v2.vlm().batch([ASK], batch_size=0)
    with pytest.raises(ConfigError, match="batch_size must be a whole number"):
        v2.vlm().batch([ASK], batch_size="8")  # type: ignore[arg-type]


# -- reuse -----------------------------------------------------------------------------------------------------------


def test_a_follow_up_turn_computes_only_what_is_new(release, count_tokens):
    vlm = release.vlm()
    messages = ask(release.image("landscape.png"))
    first = vlm.chat(messages, max_new_tokens=6, chat_template="chat")
    second_messages = follow_up(messages, first, "And what else?")
    counts = count_tokens(vlm)
    second = vlm.chat(second_messages, max_new_tokens=6, chat_template="chat")
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    assert counts == [second.usage.prompt_tokens - second.usage.cached_tokens, 1, 1, 1, 1, 1]
    fresh = release.vlm().chat(second_messages, max_new_tokens=6, chat_template="chat")
    assert second.token_ids == fresh.token_ids
    assert fresh.usage.cached_tokens == 0


def test_interleaved_conversations_stay_right(release):
    vlm = release.vlm()
    pictures = ["landscape.png", "portrait.png", "square.png"]
    chats = {name: ask(release.image(name), "What is this?") for name in pictures}
    chats["text"] = ASK
    for question in ("Which colour?", "Where is it? 在哪里？", "Why?"):
        for name, messages in chats.items():
            reply = vlm.chat(messages, max_new_tokens=8, chat_template="chat")
            assert reply.token_ids == release.vlm().chat(messages, max_new_tokens=8, chat_template="chat").token_ids
            chats[name] = follow_up(messages, reply, question)


def test_two_streams_in_turns_do_not_disturb_each_other(release):
    vlm = release.vlm()
    messages = [ask(release.image("landscape.png")), ask(release.image("landscape.png"), "Why?")]
    streams = [vlm.stream(row, max_new_tokens=15, chat_template="chat") for row in messages]
    texts = ["", ""]
    while any(stream.reply is None for stream in streams):
        for index, stream in enumerate(streams):
            texts[index] += next(stream, "")
    assert texts == [release.vlm().chat(row, max_new_tokens=15, chat_template="chat").text for row in messages]


def test_another_picture_with_the_same_text_is_not_taken_from_the_cache(release):
    vlm = release.vlm()
    landscape = vlm.chat(ask(release.image("landscape.png")), max_new_tokens=8, chat_template="chat")
    square = vlm.chat(ask(release.image("square.png")), max_new_tokens=8, chat_template="chat")
    assert square.usage.cached_tokens <= 1
    fresh = release.vlm().chat(ask(release.image("square.png")), max_new_tokens=8, chat_template="chat")
    assert square.token_ids == fresh.token_ids != landscape.token_ids


def test_a_picture_is_encoded_once_for_all_turns_and_rows(release, monkeypatch):
    vlm, calls = release.vlm(), []
    tower_forward = vlm.model.model.vision.forward

    def forward(pixel_values, *args):
        calls.append(len(pixel_values))
        return tower_forward(pixel_values, *args)

    monkeypatch.setattr(vlm.model.model.vision, "forward", forward)
    path = release.image("landscape.png")
    vlm.batch([ask(path), ask(path.read_bytes(), "Why?"), ask(Image.open(path), "Who?")], max_new_tokens=2)
    vlm.chat(ask(str(path), "When?"), max_new_tokens=2)
    assert calls == [1]
    vlm.chat(ask(release.image("square.png")), max_new_tokens=2)
    assert calls == [1, 1]


def test_a_batch_computes_a_picture_once_also_where_none_is_kept(v2, monkeypatch):
    vlm, calls = v2.vlm(max_feature_bytes=0), []
    path = v2.image("landscape.png")
    some = [ask(path), ask(v2.image("square.png")), ask(path, "Why?")]
    expected = [vlm.chat(messages, max_new_tokens=4).token_ids for messages in some]
    tower_forward = vlm.model.model.vision.forward

    def forward(pixel_values, *args):
        calls.append(pixel_values.shape[0])
        return tower_forward(pixel_values, *args)

    monkeypatch.setattr(vlm.model.model.vision, "forward", forward)
    assert [reply.token_ids for reply in vlm.batch(some, max_new_tokens=4)] == expected
    assert calls == [1, 1]
    assert len(vlm.features) == 0


def test_nothing_is_kept_when_told_so(v2):
    vlm = v2.vlm(max_feature_bytes=0, max_conversations=0)
    for _ in range(2):
        reply = vlm.chat(ask(v2.image("landscape.png")), max_new_tokens=3)
        assert reply.usage.cached_tokens == 0
    assert (len(vlm.features), vlm.features.num_bytes, len(vlm.conversations)) == (0, 0, 0)


def test_a_sampled_follow_up_equals_a_fresh_run(v2):
    vlm = v2.vlm()
    options = {"temperature": 1.0, "seed": 3, "max_new_tokens": 8, "chat_template": "chat"}
    messages = ask(v2.image("landscape.png"))
    second = follow_up(messages, vlm.chat(messages, **options), "Why?")
    reply = vlm.chat(second, **options)
    assert reply.usage.cached_tokens > 0
    assert reply.token_ids == v2.vlm().chat(second, **options).token_ids


def test_an_answer_longer_than_the_first_buffer(v2):
    reply = v2.vlm().chat(ASK, max_new_tokens=600)
    assert len(reply.token_ids) == 600
    inputs = v2.loaded.processor.apply_chat_template(ASK)
    generated = v2.loaded.model.generate(**inputs, max_new_tokens=600, do_sample=False)
    assert generated[0, inputs["input_ids"].shape[1] :].tolist() == reply.token_ids


def test_requests_from_several_threads(v2):
    vlm = v2.vlm()
    prompts = [v2.prompts[name][0] for name in ("chat_image", "zh_image", "text_only_chat", "chat_multiturn_image")]
    expected = [v2.vlm().chat(row, max_new_tokens=10, chat_template="chat").token_ids for row in prompts]
    found: dict[int, list[list[int]]] = {}

    def run(index):
        replies = [vlm.chat(prompts[index], max_new_tokens=10, chat_template="chat") for _ in range(3)]
        found[index] = [reply.token_ids for reply in replies]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [expected[index]] * 3 for index in range(len(prompts))}


# -- how an answer ends ----------------------------------------------------------------------------------------------


def test_eos_ends_the_answer_and_is_not_in_its_text(v2):
    ids = v2.greedy_ids["chat_image"]
    messages, template = v2.prompts["chat_image"]
    reply = v2.vlm(eos_token_ids=[ids[4]]).chat(messages, chat_template=template, max_new_tokens=10)
    assert reply.token_ids == ids[:5]
    assert reply.finish_reason == "stop"
    assert reply.text == v2.loaded.processor.decode(ids[:4])


def test_a_stop_text_cuts_the_answer_also_across_tokens(release):
    messages, template = release.prompts["grounding_image"]
    whole = release.vlm().chat(messages, chat_template=template, max_new_tokens=30)
    for start, end in ((2, 5), (4, 9)):
        stop = whole.text[start:end]
        reply = release.vlm().chat(messages, chat_template=template, max_new_tokens=30, stop=["not in it", stop])
        assert reply.text == whole.text[: whole.text.index(stop)]
        assert reply.finish_reason == "stop"
        assert len(reply.token_ids) < 30
        stream = release.vlm().stream(messages, chat_template=template, max_new_tokens=30, stop=stop)
        assert "".join(stream) == reply.text
        (row,) = release.vlm().batch([messages], chat_template=template, max_new_tokens=30, stop=stop)
        assert (row.text, row.finish_reason) == (reply.text, "stop")


def test_max_length_counts_the_prompt(release):
    messages, template = release.prompts["chat_image"]
    prompt_tokens = len(release.expected["chat_image"]["input_ids"])
    reply = release.vlm().chat(messages, chat_template=template, max_length=prompt_tokens + 4)
    assert reply.token_ids == release.greedy_ids["chat_image"][:4]


def test_boxes_only_where_grounding_is_on(v2, monkeypatch):
    text = "a dog [[100,200,300,400]] here"
    spelling = {token_id: text[3 * i : 3 * i + 3] for i, token_id in enumerate(v2.greedy_ids["text_only_chat"])}
    assert len(spelling) == 10
    monkeypatch.setattr(v2.loaded.processor, "decode", lambda ids: "".join(spelling[token_id] for token_id in ids))
    assert v2.vlm().chat(ASK, max_new_tokens=10).boxes == []
    (found,) = v2.vlm().chat(ASK, max_new_tokens=10, grounding=True).boxes
    assert tuple(found.boxes[0]) == (100, 200, 300, 400)
    assert len(v2.vlm(grounding=True).batch([ASK], max_new_tokens=10)[0].boxes) == 1
    assert v2.vlm(grounding=True).chat(ASK, max_new_tokens=10, grounding=False).boxes == []


# -- bad input, before any compute -----------------------------------------------------------------------------------


@pytest.fixture
def idle(release, monkeypatch):
    """A VLM whose network must not run."""
    vlm = release.vlm()
    monkeypatch.setattr(vlm.model.model, "forward", None)
    monkeypatch.setattr(vlm.model.model.vision, "forward", None)
    return vlm


def test_a_prompt_longer_than_the_context(idle):
    context = idle.model.config.max_position_embeddings
    messages = [{"role": "user", "content": "dog " * context}]
    with pytest.raises(PromptError, match=f"more than the {context} that this model holds"):
        idle.stream(messages)
    with pytest.raises(PromptError, match="ask for at most"):
        idle.chat(ASK, max_new_tokens=context)
    with pytest.raises(PromptError, match="Conversation 1 of 2"):
        idle.batch([ASK, messages])


def test_image_slots_count_in_the_context(release, monkeypatch):
    vlm = release.vlm()
    prompt_tokens = len(release.expected["chat_image"]["input_ids"])
    monkeypatch.setattr(vlm._steps, "context_tokens", prompt_tokens + 5)
    messages, template = release.prompts["chat_image"]
    assert len(vlm.chat(messages, chat_template=template).token_ids) == 5
    with pytest.raises(PromptError, match="at most 5 new tokens"):
        vlm.chat(messages, chat_template=template, max_new_tokens=6)


def test_two_images_an_empty_prompt_and_an_unknown_template(idle, release):
    image = {"type": "image", "image": str(release.image("square.png"))}
    with pytest.raises(PromptError, match="2 images"):
        idle.chat([{"role": "user", "content": [image, image, {"type": "text", "text": "x"}]}])
    with pytest.raises(PromptError, match="empty"):
        idle.chat([{"role": "user", "content": ""}], chat_template="base")
    with pytest.raises(PromptError, match=r"'chatt'.*Did you mean 'chat'"):
        idle.chat(ASK, chat_template="chatt")
    with pytest.raises(PromptError, match="one conversation"):
        idle.chat([ASK, ASK])


def test_a_bad_image_and_a_wrong_option(idle, tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(MediaError):
        idle.chat(ask(tmp_path / "empty.png"))
    with pytest.raises(ConfigError, match=r"'temprature'.*Did you mean 'temperature'"):
        idle.stream(ASK, temprature=1)
    with pytest.raises(ConfigError, match=r"Did you mean 'batch_size'|No generation option 'batch_sise'"):
        idle.batch([ASK], batch_sise=2)


@pytest.mark.parametrize("size", [(1, 1), (20000, 1), (1, 2000)])
def test_odd_pictures_get_an_answer(v2, size):
    reply = v2.vlm().chat(ask(Image.new("RGB", size, "red")), max_new_tokens=2)
    assert len(reply.token_ids) == 2


def test_no_global_state_is_touched(v2):
    before = torch.get_rng_state()
    v2.vlm().chat(ASK, max_new_tokens=4, temperature=1.0, seed=1)
    v2.vlm().chat(ASK, max_new_tokens=4, temperature=1.0)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
