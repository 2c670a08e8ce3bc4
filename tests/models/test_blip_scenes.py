"""Tiny BLIPs on drawn scenes, by the recipes of projects/blip: they train from drawn weights and are evaluated."""

import json
from pathlib import Path
from typing import Any

import pytest

import lavish
from lavish.common.config import Config
from lavish.common.errors import CheckpointError, ConfigError
from lavish.datasets.scenes.drawn import SceneSettings, Stream, caption, questions
from lavish.datasets.scenes.world import COLOURS, SHAPES
from lavish.models import load_model
from lavish.models.blip.processor import BlipProcessor, load_tokenizer
from lavish.runners.evaluation import evaluate
from lavish.runners.recipe import check, open_recipe, train

ROOT = Path(__file__).resolve().parents[2]
TINY = "projects/blip/tiny"
NUM_STEPS = 24


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipes name the tiny vocabulary from there."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize(("name", "metric"), [("scenes_caption", "exact_match"), ("scenes_vqa", "vqa_accuracy")])
def test_a_recipe_trains_and_is_evaluated(name: str, metric: str, tmp_path: Path) -> None:
    size = f"datasets.{name}.build_info.annotations"
    short = [
        *(f"run.output_dir={tmp_path / 'out'}", "run.max_epoch=1", "run.batch_size_train=8", "run.warmup_steps=4"),
        *("run.log_freq=4", "run.device=cpu", f"{size}.train.num_samples={8 * NUM_STEPS}", f"{size}.val.num_samples=4"),
    ]
    (out,) = train(open_recipe(f"projects/blip/train/{name}.yaml", short)).values()
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == NUM_STEPS // 4
    assert losses[-1] < 0.6 * losses[0]
    opened: Any = lavish.load(out)
    assert type(opened.samples).arch == f"blip_{name.removeprefix('scenes_')}", "the folder tells heads and words"
    assert len(opened.samples.tokenizer) == 35
    found = {}
    for blank in (False, True):
        folder = tmp_path / f"blank_{blank}"
        options = [
            *(f"model.finetuned={out / 'checkpoint_best.pth'}", f"run.output_dir={folder}", "run.device=cpu"),
            *(f"{size}.test.num_samples=6", f"datasets.{name}.build_info.blank={blank}"),
        ]
        (split,) = evaluate(Config(ROOT / f"projects/blip/eval/{name}_eval.yaml", options)).splits
        assert split.scores is not None
        assert 0 <= split.scores.measures[metric].value <= 100
        found[blank] = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [row["reference"] for row in found[False]] == [row["reference"] for row in found[True]]
    assert "<img" in (tmp_path / "blank_False" / "report.html").read_text(), "drawn pictures stand in the report"


def test_the_vocabulary_has_every_word_of_the_world() -> None:
    processor = BlipProcessor(load_tokenizer(TINY))
    unknown = int(str(processor.tokenizer.unk_token_id))
    stream = Stream(1, SceneSettings(max_items=3, shapes=list(SHAPES), colours=list(COLOURS)))
    scenes = [stream.scene(index)[0] for index in range(60)]
    texts = [f"{processor.prompt}{caption(scene)}" for scene in scenes]
    texts += [text for scene in scenes for _, *both in questions(scene) for text in both]
    ids, mask = processor.encode([*texts, *SHAPES, *COLOURS])
    assert not ids.eq(unknown).any()
    assert mask.sum(dim=1)[-1] == 3, "a word is one token"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("promt=x", "model.promt is no setting of 'blip_vqa'. Did you mean 'prompt'"),
        ("vision_config.hiden_size=3", "vision_config.hiden_size is no field of a BLIP config. Did you mean"),
        ("vision_config.num_attention_heads=5", "hidden_size 96 does not divide into 5 heads"),
        ("med_config_path=3", "med_config_path must be a path"),
    ],
)
def test_a_model_section_is_checked_before_anything_is_built(option: str, message: str) -> None:
    recipe = open_recipe("projects/blip/train/scenes_vqa.yaml", [f"model.{option}"])
    with pytest.raises(ConfigError, match=message):
        check(recipe)
    evaluation = Config(ROOT / "projects/blip/eval/scenes_vqa_eval.yaml", [f"model.{option}"])
    with pytest.raises(ConfigError, match=message):
        evaluate(evaluation)


def test_a_med_config_of_ones_own(tmp_path: Path) -> None:
    """`med_config_path` is LAVIS's key; its fields stand over those of the model type."""
    sizes = {"hidden_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    wanted = {
        "image_size": 16,
        "tokenizer": TINY,
        "vision_config": sizes,
        "load_finetuned": False,
        "load_pretrained": False,
        "med_config_path": f"{TINY}/med_config.json",
    }
    model = load_model("blip_caption", "base_coco", **wanted)
    fields = json.loads((ROOT / TINY / "med_config.json").read_text())
    text = model.network.config.text_config
    assert text.vocab_size == fields["vocab_size"] == len(model.tokenizer)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_dropout_prob", "initializer_range"):
        assert getattr(text, name) == fields[name]
    for path, error in ((3, ConfigError), (str(tmp_path / "none.json"), CheckpointError)):
        with pytest.raises(error, match=r"med_config_path must be a path|none\.json cannot be read"):
            load_model("blip_caption", "base_coco", **{**wanted, "med_config_path": path})
