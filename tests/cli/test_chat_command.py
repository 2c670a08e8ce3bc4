"""`lavish chat` through its options: aliases of the released demos, contradictions, languages, pipes."""

import io
from pathlib import Path

import pytest

from lavish.cli import main


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch):
    def feed(text: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))

    return feed


def test_through_pipes_stdout_holds_the_answers_alone(
    piped, vlm, checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    piped("What is it?\nclear\n\nHello\nstop\nnever\n")
    assert main(["chat", str(checkpoint), "--image", str(picture), "--max-new-tokens", "5", "--lang", "en"]) == 0
    printed = capsys.readouterr()
    image = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    expected = [vlm.chat([{"role": "user", "content": content}], max_new_tokens=5).text for content in (image, "Hello")]
    assert printed.out == "".join(text + "\n" for text in expected)
    assert "loaded in" in printed.err
    assert "square.png" in printed.err


def test_the_released_demos_options(piped, vlm, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piped("\nHello\nstop\n")
    options = "--version vqa --max_length 60 --top_p 0.4 --top_k 1 --temperature .8 --bf16 --stream_chat --chinese"
    options += f" --local_tokenizer {checkpoint} --quant 8"
    assert main(["chat", "--from_pretrained", str(checkpoint), *options.split()]) == 0
    printed = capsys.readouterr()
    assert printed.out.strip()
    assert "已加载" in printed.err


def test_a_failed_question_fails_a_pipe(piped, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    piped("Hello there, how are you?\n")
    assert main(["chat", str(checkpoint), "--max-length", "8"]) == 1
    assert "max_length=8 leaves none for the answer" in capsys.readouterr().err


def test_interrupt_through_a_pipe_is_130(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert main(["chat", str(checkpoint)]) == 130


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fp16", "--bf16"], "--fp16 and --bf16 contradict each other"),
        (["--chinese", "--english"], "contradict each other"),
        (["--lang", "fr"], "--lang fr: there is en and zh"),
        (["--quant", "2"], "--quant 2 is not offered"),
        (["--version", "chta"], "No template 'chta'. Did you mean 'chat'?"),
        (["--max-length", "9", "--max-new-tokens", "9"], "not both"),
        (["--top-p", "3"], "top_p must be above 0"),
        (["--from_pretrained", "other"], "contradict each other"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--dtype", "float17"], "Did you mean 'float1"),
    ],
)
def test_what_cannot_be_is_said_with_words(
    options: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", str(checkpoint), *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.out == ""


def test_a_number_that_is_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--top-k", "many"]) == 2
    assert "--top-k" in capsys.readouterr().err


def test_cogagent_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--from_pretrained", "cogagent-chat"]) == 2
    assert "CogAgent" in capsys.readouterr().err
