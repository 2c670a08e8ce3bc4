"""Chat messages: every accepted form, and what each malformed one is told."""

import subprocess
import sys

import pytest

from lavish.common.errors import PromptError
from lavish.common.messages import ImagePart, Message, TextPart, images, is_batch, normalize, turns

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def test_a_string_and_a_list_of_parts_are_the_same():
    assert normalize([USER]) == normalize([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}])
    assert normalize([USER]) == [Message("user", (TextPart("Hi"),))]


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image", "image": b"\x89PNG"}, b"\x89PNG"),
        ({"type": "image", "image": "a.png"}, "a.png"),
        ({"type": "image", "url": "https://example.org/a.png"}, "https://example.org/a.png"),
        ({"type": "image", "path": "a.png"}, "a.png"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}, "data:image/png;base64,AA=="),
        ({"type": "image_url", "image_url": "https://example.org/a.png"}, "https://example.org/a.png"),
    ],
)
def test_forms_of_an_image(part, source):
    (message,) = normalize([{"role": "user", "content": [part]}])
    assert message.parts == (ImagePart(source),)
    assert message.images() == [source]


def test_keys_that_say_nothing():
    assert normalize([{**USER, "image": None, "tool_calls": [], "name": ""}]) == normalize([USER])


def test_checked_messages_pass_through():
    checked = normalize([USER, ANSWER])
    assert normalize(checked) == checked


def test_text_parts_are_joined_and_images_keep_their_message():
    content = [{"type": "text", "text": "left"}, {"type": "image", "image": "a.png"}, {"type": "text", "text": "right"}]
    checked = normalize([USER, ANSWER, {"role": "user", "content": content}])
    assert checked[2].text() == "left right"
    assert checked[2].text("\n") == "left\nright"
    assert list(images(checked)) == [(2, "a.png")]


def test_turns():
    system, rounds = turns(normalize([{"role": "system", "content": "Be brief."}, USER, ANSWER, USER]))
    assert system is not None
    assert system.text() == "Be brief."
    assert [(turn.user.text(), turn.answer and turn.answer.text()) for turn in rounds] == [
        ("Hi", "Hello"),
        ("Hi", None),
    ]


def test_one_conversation_or_many():
    assert not is_batch([USER])
    assert not is_batch(normalize([USER]))
    assert not is_batch([])
    assert is_batch([[USER], [USER]])
    assert is_batch([normalize([USER])])


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", "messages must be a list .* got str"),
        (USER, "got dict"),
        (None, "got NoneType"),
        ([], "messages is empty"),
        ([USER, "Hi"], "Message 1 must be a dict .* got str"),
        ([{"role": "user"}], "Message 0 has no 'content'"),
        ([{"content": "Hi"}], "Message 0 has no 'role'"),
        ([{**USER, "image": "a.png"}], r"Message 0 has the key 'image'.* Put it into the content: \[\{'type': 'image'"),
        ([{**USER, "video": b"x"}], "Message 0 has the key 'video'"),
        ([USER, {**ANSWER, "tools": [{"name": "x"}]}], "Message 1 has the key 'tools', which this model does not read"),
        ([{**USER, "metadata": "x"}], "Message 0 has the key 'metadata'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "Hi", "image": "a.png"}]}],
            "part 0: a text part holds 'image'; give that a part of its own",
        ),
        ([USER, {"role": "asistant", "content": "x"}], "Message 1 has role 'asistant'.*Did you mean 'assistant'"),
        ([{"role": "user", "content": None}], "Message 0 has content of type NoneType"),
        ([{"role": "user", "content": ["Hi"]}], "Message 0, part 0: a part must be a dict"),
        ([{"role": "user", "content": [{"text": "Hi"}]}], "Message 0, part 0: a part must be a dict with a 'type'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Message 0, part 0: text must be a string, got NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "needs exactly one of image, url, path, found 0"),
        ([{"role": "user", "content": [{"type": "image", "url": "a", "path": "b"}]}], "found 2"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "needs {'image_url': {'url'"),
        ([{"role": "user", "content": [{"type": "imge", "image": "a"}]}], "unknown type 'imge'.*Did you mean 'image'"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a"}]}], "unknown type 'audio'"),
        ([USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}], "Message 1 .* holds an image"),
        ([{"role": "system", "content": [{"type": "image", "image": "a"}]}], "Message 0 .* holds an image"),
        ([{"role": "user", "content": "half \ud83d"}], "lone surrogate at character 5"),
    ],
)
def test_malformed(messages, says):
    with pytest.raises(PromptError, match=says):
        normalize(messages)


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([ANSWER], "Message 0 has role 'assistant' and starts the conversation; expected 'user'"),
        ([USER, USER], "Message 1 has role 'user' and follows a 'user' message; expected 'assistant'"),
        ([USER, ANSWER, ANSWER], "Message 2 has role 'assistant'"),
        ([USER, {"role": "system", "content": "x"}], "Message 1 has role 'system'"),
        ([{"role": "system", "content": "x"}], "no question"),
    ],
)
def test_turns_out_of_order(messages, says):
    with pytest.raises(PromptError, match=says):
        turns(normalize(messages))


def test_importing_it_needs_no_torch():
    code = "import sys, lavish.common.messages; sys.exit('torch' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("key", ["video", "path"])
def test_a_video_is_a_part_where_it_is_allowed(key: str) -> None:
    messages = [{"role": "user", "content": [{"type": "video", key: "clip.mp4"}, {"type": "text", "text": "what?"}]}]
    (checked,) = normalize(messages, allow_videos=True)
    assert checked.videos() == ["clip.mp4"]
    assert checked.images() == []
    with pytest.raises(PromptError, match="Message 0 holds a video, and this model sees no videos"):
        normalize(messages)
    with pytest.raises(PromptError, match="sees no videos"):
        normalize([checked])


def test_wrong_video_parts() -> None:
    with pytest.raises(PromptError, match="a video part needs exactly one of video, path, found 0"):
        normalize([{"role": "user", "content": [{"type": "video"}]}], allow_videos=True)
    with pytest.raises(PromptError, match="videos belong to user messages"):
        normalize(
            [{"role": "assistant", "content": [{"type": "video", "video": "clip.mp4"}]}],
            allow_videos=True,
        )
