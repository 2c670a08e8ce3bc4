"""`lavish chat` and `predict` with the other families: pieces, adapters, models that hold no conversation."""

import io
import itertools
import json
import sys
from pathlib import Path

import pytest

from lavish.cli import main

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
MINIGPT4 = FIXTURES / "minigpt4qwen/open/checkpoint"
BLIP = FIXTURES / "blip_caption/open/checkpoint"


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


def run_twice(arguments: list[str], output: Path) -> list[dict]:
    """Run a predict, then again, which must leave the file as it is."""
    status = main([*arguments, "-o", str(output)])
    before = output.read_bytes()
    assert main([*arguments, "-o", str(output)]) == status
    assert output.read_bytes() == before
    return [json.loads(line) for line in before.decode().splitlines()]


def test_many_inputs_of_a_model_that_captions(heads: str, tmp_path: Path) -> None:
    inputs = FIXTURES / "blip_caption/open/inputs"
    model = ["predict", str(BLIP), "--config", heads, "--device", "cpu"]
    rows = run_twice([*model, "--input", str(inputs)], tmp_path / "out.jsonl")
    assert [row["id"] for row in rows] == ["img0.png", "img1.png"]
    import lavish

    vlm = lavish.load(BLIP, config=heads, device="cpu")
    assert [row["answer"] for row in rows] == [vlm.caption(inputs / row["id"]) for row in rows]
    source = tmp_path / "in.jsonl"
    lines = [
        {"image": str(inputs / "img0.png")},
        {"image": str(inputs / "img0.png"), "question": "What?"},
        {"images": [str(inputs / "img0.png"), str(inputs / "img1.png")]},
        {"question": ""},
        {"image": "absent.png"},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = run_twice([*model, "--input", str(source)], tmp_path / "mixed.jsonl")
    kinds = [None, "ConfigError", "PromptError", "PromptError", "MediaError"]
    assert [row.get("error_type") for row in rows] == kinds
    assert "2 were given" in rows[2]["error"]
    assert main([*model, "--input", str(source), "--top-p", "0.5"]) == 2


def test_many_inputs_of_a_model_that_answers(heads: str, tmp_path: Path) -> None:
    inputs = FIXTURES / "blip_vqa/open/inputs"
    model = ["predict", str(FIXTURES / "blip_vqa/open/checkpoint"), "--config", heads, "--device", "cpu"]
    rows = run_twice([*model, "--input", str(inputs), "-q", "what is it?"], tmp_path / "out.jsonl")
    import lavish

    vlm = lavish.load(FIXTURES / "blip_vqa/open/checkpoint", config=heads, device="cpu")
    assert [row["answer"] for row in rows] == [vlm.answer(inputs / row["id"], "what is it?") for row in rows]
    rows = run_twice([*model, "--input", str(inputs)], tmp_path / "captions.jsonl")
    assert {row["error_type"] for row in rows} == {"ConfigError"}


def test_a_dialogue_about_features_is_asked_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    image = str(FIXTURES / "blip_vqa/open/inputs/img0.png")
    model = [str(FIXTURES / "gpt_dialogue/open/checkpoint"), "--device", "cpu"]
    assert main(["predict", *model, "--image", image, "-q", "What?"]) == 2
    assert "answers about features of a video" in " ".join(capsys.readouterr().err.split())


def test_several_pictures_and_a_video_in_a_question(heads: str, tmp_path: Path, capsys) -> None:
    pytest.importorskip("av")
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from video_clip import clip

    import lavish

    (tmp_path / "a.mp4").write_bytes(clip(5))
    images = [str(FIXTURES / "blip_caption/open/inputs" / name) for name in ("img0.png", "img1.png")]
    lines = [
        {"images": images, "question": "Which?"},
        {"video": "a.mp4", "question": "What happens?"},
        {"video": "absent.mp4", "question": "What happens?"},
        {"images": "a.png", "question": "?"},
        {"images": images, "image": images[0], "question": "?"},
        {"video": 3, "question": "?"},
    ]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = [str(MINIGPT4), "--piece", f"llm={FIXTURES / 'qwen/llm'}", "--config", heads, "--device", "cpu"]
    short = ["--max-new-tokens", "4"]
    rows = run_twice(["predict", *model, "--input", str(source), *short], tmp_path / "out.jsonl")
    kinds = [None, None, "MediaError", "DataError", "DataError", "DataError"]
    assert [row.get("error_type") for row in rows] == kinds
    assert rows[0]["images"] == images
    assert rows[1]["video"] == str(tmp_path / "a.mp4")
    vlm = lavish.load(MINIGPT4, llm=FIXTURES / "qwen/llm", config=heads, device="cpu")
    seen = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*seen, {"type": "text", "text": "Which?"}]}]
    assert rows[0]["answer"] == vlm.chat(messages, max_new_tokens=4).text
    capsys.readouterr()
    both = ["--image", images[0], "--image", images[1], "-q", "Which?"]
    assert main(["predict", *model, *both, *short]) == 0
    assert capsys.readouterr().out == rows[0]["answer"] + "\n"
    glm = [str(FIXTURES / "glm4v/open/checkpoint"), "--device", "cpu"]
    rows = run_twice(["predict", *glm, "--input", str(source), *short], tmp_path / "glm.jsonl")
    assert [row.get("error_type") for row in rows[:2]] == ["PromptError", "PromptError"]
    source.write_text(json.dumps({"images": images[:1], "question": "Which?"}))
    assert main(["predict", *model, "--input", str(source), *short, "-o", str(tmp_path / "out.jsonl")]) == 2
    assert "another image or question for the id 1" in " ".join(capsys.readouterr().err.split())


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
