"""`--video` of chat and predict: on a small CogVLM2-Video, and what is refused before anything is loaded."""

import io
import json
import sys
from pathlib import Path

import pytest

from lavish.checkpoints.writer import save_sharded
from lavish.cli import main

pytest.importorskip("av")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from video_clip import clip

IMAGE_EXPERTS = ("vision_expert", "vision_mlp")


@pytest.fixture(scope="module")
def video_model(tmp_path_factory) -> Path:
    from safetensors.torch import load_file

    released = Path(__file__).resolve().parents[1] / "fixtures/cogvlm2/open/checkpoint"
    folder = tmp_path_factory.mktemp("video")
    weights = {name: w for shard in released.glob("*.safetensors") for name, w in load_file(shard).items()}
    save_sharded({name: w for name, w in weights.items() if not any(part in name for part in IMAGE_EXPERTS)}, folder)
    fields = json.loads((released / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "architectures": ["CogVLMVideoForCausalLM"]}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((released / name).read_bytes())
    return folder


@pytest.fixture
def movie(tmp_path: Path) -> Path:
    path = tmp_path / "a movie.mp4"
    path.write_bytes(clip(25, rate=10))
    return path


def question(movie: Path, text: str) -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": str(movie)}, {"type": "text", "text": text}]}]


def test_predict_and_chat_see_the_video(
    video_model: Path, movie: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import lavish

    expected = lavish.load(video_model).chat(question(movie, "What?"), max_new_tokens=4).text + "\n"
    options = [str(video_model), "--video", f"'{movie}'", "--max-new-tokens", "4"]
    assert main(["predict", *options, "-q", "What?"]) == 0
    assert capsys.readouterr().out == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nstop\n"))
    assert main(["chat", *options, "--lang", "en"]) == 0
    printed = capsys.readouterr()
    assert printed.out == expected
    assert "video a movie.mp4" in printed.err


def test_inspect_finds_no_image_experts(video_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(video_model), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["is_complete"]
    assert "image experts" not in {part["name"] for part in seen["parts"]}
    assert main(["inspect", str(video_model), "--tree", "--set", "num_hidden_layers=1"]) == 0
    assert "vision_expert" not in capsys.readouterr().out


def test_saved_conversations_name_the_video(vlm, script, movie: Path, tmp_path: Path) -> None:
    from lavish.cli.dialogue import Dialogue
    from lavish.cli.wording import WORDINGS

    screen = script(["What?", "/image", "", "Hello", "stop"])
    dialogue = Dialogue(vlm, screen, WORDINGS["en"], generation={"max_new_tokens": 2}, folder=tmp_path)
    assert dialogue.run(video=str(movie)) == 1
    assert "this model sees no videos" in screen.errors[0]
    assert dialogue.video is None  # the conversation after it is about none
    assert len(screen.answers) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "--video", "absent.mp4", "-q", "What?"], "'absent.mp4' is no file"),
        (["predict", "--video", "https://example.com/a.mp4", "-q", "What?"], "URLs of videos are not fetched"),
        (["predict", "--video", "a.mp4", "--image", "a.png"], "give it without --image and --input"),
        (["chat", "--video", "absent.mp4"], "'absent.mp4' is no file"),
        (["chat", "--video", "a.mp4", "--image", "a.png"], "--image and --video contradict each other"),
    ],
)
def test_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_model_without_videos_says_so(checkpoint: Path, movie: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(checkpoint), "--video", str(movie), "-q", "What?"]) == 2
    assert "this model sees no videos" in " ".join(capsys.readouterr().err.split())
