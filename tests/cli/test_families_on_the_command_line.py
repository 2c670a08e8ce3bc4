"""`lavish chat` and `predict` with the other families: pieces, adapters, models that hold no conversation."""

import io
import itertools
import json
from pathlib import Path

import pytest

from lavish.cli import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MINIGPT4 = FIXTURES / "minigpt4qwen/open/checkpoint"
BLIP = FIXTURES / "blip_caption/open/checkpoint"
# peft 0.21 asks transformers 5.23 under the attribute's old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.fixture
def heads(tmp_path: Path) -> str:
    """What the tiny towers' files do not say."""
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"vision_config": {"num_attention_heads": 4}}))
    return str(file)


def test_chat_of_a_release_in_pieces(monkeypatch, heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n/template base\nAgain\nstop\n"))
    pieces = ["--piece", f"llm={FIXTURES / 'qwen/llm'}", "--config", heads]
    main(["chat", str(MINIGPT4), *pieces, "--max-new-tokens", "4", "--lang", "en", "--device", "cpu"])
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 2
    assert "No template 'base'" in printed.err + printed.out


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (["llm"], "write NAME=PATH"),
        (["llm=a", "llm=b"], "--piece llm= was given twice"),
        (["lm=a"], "Did you mean 'llm'"),
        ([], "the piece 'llm' is absent"),
    ],
)
def test_wrong_pieces(pieces: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [part for piece in pieces for part in ("--piece", piece)]
    assert main(["predict", str(MINIGPT4), "--question", "Hello", *options, "--device", "cpu"]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_predict_asks_an_adapter_about_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    question = ["--image", str(FIXTURES / "glm4v/open/inputs/img0.png"), "--question", "What is it?"]
    options = ["--max-new-tokens", "4", "--device", "cpu"]
    glm = FIXTURES / "glm4v/open"
    for model in ([str(glm / "adapter")], [str(glm / "checkpoint"), "--adapter", str(glm / "adapter")]):
        assert main(["predict", *model, *question, *options]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second


def test_a_model_that_captions(monkeypatch, heads: str, capsys: pytest.CaptureFixture[str]) -> None:
    image = ["--image", str(FIXTURES / "blip_caption/open/inputs/img0.png")]
    model = [str(BLIP), "--config", heads, "--device", "cpu"]
    assert main(["predict", *model, *image]) == 0
    assert capsys.readouterr().out.strip()
    assert main(["predict", *model, *image, "--question", "What?"]) == 2
    assert "has no answer: it can caption" in " ".join(capsys.readouterr().err.split())
    assert main(["predict", *model, *image, "--top-p", "0.5"]) == 2
    assert "takes no top_p" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    assert main(["chat", *model]) == 2
    assert "holds no conversation: it can caption" in " ".join(capsys.readouterr().err.split())


SET_HEADS = ["--set", "vision_config.num_attention_heads=4"]
INSPECTED = [
    (FIXTURES / "glm4v/open/checkpoint", []),
    (FIXTURES / "clip_qwen/open/checkpoint", []),
    (MINIGPT4, ["--piece", f"llm={FIXTURES / 'qwen/llm'}", *SET_HEADS]),
    (BLIP, SET_HEADS),
    (BLIP / "blip_coco_caption_base.pth", SET_HEADS),
    (FIXTURES / "blip_vqa/open/checkpoint", SET_HEADS),
    (FIXTURES / "gpt_dialogue/open/checkpoint", []),
]


@pytest.mark.parametrize(("model", "options"), INSPECTED)
def test_inspect_finds_every_tensor(model: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), *options, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["is_complete"]
    assert not seen["missing"]
    assert main(["inspect", str(model), *options]) == 0
    assert "complete: every tensor" in capsys.readouterr().out


@pytest.mark.parametrize(("model", "options"), INSPECTED)
def test_inspect_draws_the_tree(model: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(model), *options, "--tree", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(model), *options, "--json"]) == 0
    assert tree["num_parameters"] <= json.loads(capsys.readouterr().out)["num_parameters"]
    assert tree["children"]


@pytest.mark.parametrize("name", ["minigpt4qwen-7b", "glm-4v-9b", "blip_vqa_okvqa", "cogvlm2-video-llama3-chat"])
def test_inspect_of_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", name, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["layout"] is None
    assert seen["num_parameters"] > 2e8
    assert main(["inspect", name, "--tree", "--set", "vision_config.num_hidden_layers=1"]) == 0
    assert "vision" in capsys.readouterr().out


def test_inspect_of_parts_counts_stored_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(FIXTURES / "glm4v/open/checkpoint"), "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert sum(part["num_bytes"] for part in seen["parts"]) == seen["num_bytes"] == sum(seen["dtypes"].values())


def test_zoo_names_models_of_several_families(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--json"]) == 0
    families = [row["family"] for row in json.loads(capsys.readouterr().out)]
    assert {"cogvlm", "glm4v_9b", "minigpt4_qwen", "blip"} <= set(families)
    assert len(list(itertools.groupby(families))) == len(set(families)), "families stand together"


def test_zoo_fits_100_columns(monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["zoo"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 100
    assert lines.index("blip") < lines.index(next(line for line in lines if line.startswith("blip_vqa_okvqa")))
    assert any("lavis:blip_feature_extractor/base" in line for line in lines)
