"""The conversation: images, history, commands, errors that keep the history, Ctrl-C, drawings, saving."""

import json
from pathlib import Path

import pytest
from PIL import Image

import lavish
from lavish.cli.dialogue import Dialogue, looks_like_image, plain_path, save_new
from lavish.cli.wording import EN, ZH
from lavish.common import grounding
from lavish.inference.vlm import Reply, Usage

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
SHORT = {"max_new_tokens": 4}


def talk(vlm, screen, folder: Path, image: Path | None = None, **options) -> tuple[Dialogue, int]:
    options = {"generation": SHORT, "words": EN, **options}
    dialogue = Dialogue(vlm, screen, folder=folder, **options)
    return dialogue, dialogue.run(None if image is None else str(image))


def test_asks_for_an_image_first_and_remembers(vlm, script, picture: Path, tmp_path: Path) -> None:
    screen = script([str(picture), "What is it?", "", "And now?", "stop"])
    dialogue, status = talk(vlm, screen, tmp_path)
    assert status == 0
    assert screen.prompts[:2] == [EN.ask_image, EN.you]
    assert screen.notes[0] == "image square.png, 64 x 64"
    assert len(screen.answers) == 2
    assert [message["role"] for message in dialogue.messages] == ["user", "assistant"] * 2
    first, second = dialogue.messages[0]["content"], dialogue.messages[2]["content"]
    assert [part["type"] for part in first] == ["image", "text"]
    assert second == "And now?"
    expected = vlm.chat(dialogue.messages[:3], **SHORT)
    assert screen.answers[1] == expected.text == dialogue.messages[3]["content"]


def test_enter_is_text_only(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "Hello", "/quit"])
    dialogue, _ = talk(vlm, screen, tmp_path, words=ZH, name="小模型")
    assert screen.prompts == [ZH.ask_image, ZH.you, ZH.you]
    assert screen.notes[0] == ZH.image_none
    assert screen.labels == ["小模型："]
    assert dialogue.messages[0] == {"role": "user", "content": "Hello"}


def test_a_wrong_path_asks_again(vlm, script, picture: Path, tmp_path: Path) -> None:
    screen = script(["nothing.png", f"'{picture}'", "stop"])
    talk(vlm, screen, tmp_path)
    assert "nothing.png" in screen.errors[0]
    assert screen.prompts == [EN.ask_image, EN.ask_image, EN.you]


def test_a_wrong_image_option_asks_again_at_a_terminal_only(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "stop"])
    assert talk(vlm, screen, tmp_path, tmp_path / "nothing.png")[1] == 0
    assert screen.prompts == [EN.ask_image, EN.you]
    screen = script(["Hello"], is_interactive=False)
    assert talk(vlm, screen, tmp_path, tmp_path / "nothing.png")[1] == 2
    assert screen.answers == []


def test_an_error_keeps_the_history(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "Hello", "word " * 9000, "Still there?", "stop"])
    dialogue, status = talk(vlm, screen, tmp_path)
    assert "more than the 8192" in screen.errors[0]
    assert [message["content"] for message in dialogue.messages[::2]] == ["Hello", "Still there?"]
    assert status == 1


def test_a_new_image_begins_a_new_conversation(vlm, script, picture: Path, other_picture: Path, tmp_path: Path) -> None:
    screen = script(["What?", f"/image {other_picture}", "And this?", "/image nothing.png", "More?", "stop"])
    dialogue, _ = talk(vlm, screen, tmp_path, picture)
    assert EN.new_image in screen.notes
    assert EN.image_keeps in screen.notes
    assert dialogue.image_name == str(other_picture)
    assert len(dialogue.messages) == 4
    assert dialogue.messages[0]["content"][1]["text"] == "And this?"


def test_a_new_image_joins_where_a_model_takes_several(script, picture: Path, other_picture: Path, tmp_path) -> None:
    folder = FIXTURES / "minigpt4qwen/open/checkpoint"
    config = {"vision_config": {"num_attention_heads": 4}}
    several = lavish.load(folder, llm=FIXTURES / "qwen/llm", config=config)
    asked = ["What?", f"/image {other_picture}", f"/image {picture}", "And these?", "More?"]
    screen = script([*asked, f"/save {tmp_path / 'a.json'}", f"/save {tmp_path / 'a.md'}", "stop"])
    dialogue, status = talk(several, screen, tmp_path, picture)
    assert status == 0
    assert EN.new_image not in screen.notes
    assert screen.notes.count(EN.image_joins) == 2
    contents = [message["content"] for message in dialogue.messages[::2]]
    assert [part["type"] for part in contents[0]] == ["image", "text"]
    assert [part["type"] for part in contents[1]] == ["image", "image", "text"]
    assert contents[2] == "More?"
    assert dialogue.messages[5]["content"] == several.chat(dialogue.messages[:5], **SHORT).text
    saved = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert [part.get("image") for part in saved[2]["content"]] == [str(other_picture), str(picture), None]
    assert (tmp_path / "a.md").read_text().count("![") == 3


def test_image_alone_asks(vlm, script, picture: Path, tmp_path: Path) -> None:
    screen = script(["", "/image", str(picture), "stop"])
    dialogue, _ = talk(vlm, screen, tmp_path)
    assert screen.prompts == [EN.ask_image, EN.you, EN.ask_image, EN.you]
    assert dialogue.image is not None


@pytest.mark.parametrize("command", ["clear", "/clear"])
def test_clear_forgets_and_asks_for_an_image(vlm, script, picture: Path, tmp_path: Path, command: str) -> None:
    screen = script(["What?", command, "", "Hello", "stop"])
    dialogue, _ = talk(vlm, screen, tmp_path, picture)
    assert screen.prompts == [EN.you, EN.you, EN.ask_image, EN.you, EN.you]
    assert dialogue.image is None
    assert dialogue.messages[0]["content"] == "Hello"


@pytest.mark.parametrize("command", ["stop", "/quit", "/exit"])
def test_leaving_works_at_both_prompts(vlm, script, tmp_path: Path, command: str) -> None:
    for lines in ([command], ["", command]):
        screen = script([*lines, "never read"])
        assert talk(vlm, screen, tmp_path)[1] == 0
        assert screen.lines == ["never read"]


def test_the_end_of_input_leaves(vlm, script, tmp_path: Path) -> None:
    assert talk(vlm, script([]), tmp_path)[1] == 0


def test_an_unknown_command_suggests(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "/hlep", "stop"])
    talk(vlm, screen, tmp_path)
    assert screen.errors == ["No command /hlep. Did you mean '/help'? /help lists them."]


def test_what_is_typed_is_never_run(vlm, script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 13 of MiniGPT4-Qwen: `:conf NAME VALUE` is read by Python's eval there, and changes nothing of the chat."""
    monkeypatch.chdir(tmp_path)
    run = "__import__('os').mkdir('made')"
    screen = script(["", f":conf max_new_tokens {run}", f"/template {run}", "stop"])
    dialogue, status = talk(vlm, screen, tmp_path)
    assert status == 0
    assert not (tmp_path / "made").exists()
    assert dialogue.messages[0]["content"] == f":conf max_new_tokens {run}"  # words for the model, like any others
    assert len(screen.errors) == 1


def test_help_names_every_command(vlm, script, tmp_path: Path) -> None:
    from lavish.cli.dialogue import COMMANDS

    for words in (EN, ZH):
        screen = script(["", "/help", "stop"])
        talk(vlm, screen, tmp_path, words=words)
        assert all(command in screen.notes[-1] for command in COMMANDS)
        assert "chat, vqa, base" in screen.notes[-1]


def test_template_shows_changes_and_refuses(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "/template", "/template vqua", "/template base", "Hello", "stop"])
    talk(vlm, screen, tmp_path)
    assert screen.notes[1].startswith("Template: chat.")
    assert "Did you mean 'vqa'?" in screen.errors[0]
    assert EN.no_history.format(name="base") in screen.notes
    expected = vlm.chat([{"role": "user", "content": "Hello"}], chat_template="base", **SHORT)
    assert screen.answers == [expected.text]


def test_no_prompt_asks_nothing_about_each_image(
    vlm, script, picture: Path, other_picture: Path, tmp_path: Path
) -> None:
    screen = script([f"/image {other_picture}", "stop"])
    dialogue, _ = talk(vlm, screen, tmp_path, picture, asks_nothing_first=True, template="base")
    assert len(screen.answers) == 2
    assert dialogue.messages[0]["content"][1]["text"] == ""


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def test_interrupt_stops_the_answer_and_keeps_the_history(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "Hello", "And now?", "stop"], interrupt_at=2)
    dialogue, status = talk(vlm, screen, tmp_path, generation={"max_new_tokens": 40})
    assert status == 0
    assert len(dialogue.messages) == 4
    # The token of the piece that was interrupted was computed; nothing behind it was.
    assert dialogue.messages[1]["content"].startswith(screen.answers[0])
    assert screen.notes[1].startswith(EN.stopped)


def test_interrupt_twice_leaves(vlm, script, tmp_path: Path) -> None:
    screen = script(["", "Hello", KeyboardInterrupt, "never read"], interrupt_at=1)
    assert talk(vlm, screen, tmp_path)[1] == 130
    screen = script(["", KeyboardInterrupt, KeyboardInterrupt, "never read"])
    assert talk(vlm, screen, tmp_path)[1] == 130
    assert EN.again_to_leave in screen.notes


def test_interrupt_at_the_prompt_once_stays(vlm, script, tmp_path: Path) -> None:
    screen = script(["", KeyboardInterrupt, "Hello", KeyboardInterrupt, "Hello", "stop"])
    dialogue, status = talk(vlm, screen, tmp_path)
    assert status == 0
    assert len(dialogue.messages) == 4


# --- pipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_first_empty", [True, False])
def test_through_a_pipe_lines_are_questions(vlm, script, tmp_path: Path, is_first_empty: bool) -> None:
    screen = script([*([""] if is_first_empty else []), "Hello", "Again"], is_interactive=False)
    dialogue, status = talk(vlm, screen, tmp_path)
    assert status == 0
    assert len(screen.answers) == 2
    assert dialogue.image is None


def test_through_a_pipe_a_first_line_may_name_the_image(vlm, script, picture: Path, tmp_path: Path) -> None:
    screen = script([str(picture), "What?", "clear", str(picture), "And?"], is_interactive=False)
    dialogue, _ = talk(vlm, screen, tmp_path)
    assert len(screen.answers) == 2
    assert dialogue.image is not None


def test_through_a_pipe_no_question_is_asked_without_its_image(vlm, script, tmp_path: Path) -> None:
    screen = script(["nothing.png", "What is this?"], is_interactive=False)
    assert talk(vlm, screen, tmp_path)[1] == 1
    assert screen.answers == []
    assert len(screen.errors) == 2


# --- drawings and files ---------------------------------------------------------------------------------------------


def reply(text: str) -> Reply:
    return Reply(text, [1], grounding.parse(text), "stop", Usage(3, 1, 0))


def test_boxes_are_drawn_into_a_new_file_each(vlm, script, picture: Path, tmp_path: Path) -> None:
    (tmp_path / "output.png").write_bytes(b"the user's own")
    screen = script([])
    dialogue, _ = talk(vlm, screen, tmp_path, picture)
    dialogue._draw(reply("A dog[[100,200,500,600]]"))
    dialogue._draw(reply("一只猫[[100,200,500,600]]"))
    assert (tmp_path / "output.png").read_bytes() == b"the user's own"
    assert screen.notes[1:] == ["Boxes drawn: output-2.png", "Boxes drawn: output-3.png", "  1: 一只猫"]
    with Image.open(tmp_path / "output-2.png") as drawing:
        assert drawing.size == (64, 64)
    dialogue._draw(reply("A dog[[1,2,3]]"))
    assert not (tmp_path / "output-4.png").exists()


def test_boxes_without_an_image_are_said(vlm, script, tmp_path: Path) -> None:
    screen = script([""])
    dialogue, _ = talk(vlm, screen, tmp_path)
    dialogue._draw(reply("A dog[[100,200,500,600]]"))
    assert screen.notes[-1] == EN.no_image_for_boxes


def test_save_new_never_overwrites(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    names = [save_new(image, tmp_path / "a.png").name for _ in range(3)]
    assert names == ["a.png", "a-2.png", "a-3.png"]


def test_save_writes_markdown_or_json_and_overwrites_nothing(vlm, script, picture: Path, tmp_path: Path) -> None:
    lines = [
        "/save x.md",
        "What?",
        f"/save {tmp_path}/talk.json",
        f"/save {tmp_path}/talk.md",
        f"/save {tmp_path}/talk.md",
    ]
    screen = script([*lines, f"/save {tmp_path}/no/talk.md"])
    talk(vlm, screen, tmp_path, picture)
    assert screen.errors[0] == EN.nothing_to_save
    assert "exists already" in screen.errors[1]
    assert "cannot be written" in screen.errors[2]
    saved = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert saved["template"] == "chat"
    assert saved["messages"][0]["content"][0] == {"type": "image", "image": str(picture)}
    assert vlm.chat(saved["messages"][:1], **SHORT).text == saved["messages"][1]["content"]
    markdown = (tmp_path / "talk.md").read_text(encoding="utf-8")
    assert f"![{picture}](<{picture}>)" in markdown
    assert "**User**\n\nWhat?" in markdown


# --- paths ----------------------------------------------------------------------------------------------------------


def test_paths_as_people_type_and_drop_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    spaced = tmp_path / "my picture.png"
    spaced.touch()
    for typed in (f'"{spaced}"', f"'{spaced}'", str(spaced).replace(" ", "\\ "), spaced.as_uri(), "~/my picture.png"):
        assert plain_path(f" {typed} ") == str(spaced)
    assert plain_path("https://example.com/a%20b.png") == "https://example.com/a%20b.png"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", True),
        ("photo.JPG", True),
        ("https://example.com/a.png", True),
        ("https://example.com says hello", False),
        ("What is in photo.jpg", False),
        ("Hello", False),
        ("x" * 5000, False),
        ("a\0b", False),
    ],
)
def test_what_looks_like_an_image(line: str, expected: bool) -> None:
    assert looks_like_image(line) is expected
