"""Publish a finished and evaluated run as the bundled model: copy its files into the package and write its card.

    lavish train projects/pocket/train.yaml
    lavish evaluate projects/pocket/evaluate.yaml --set model.path=output/pocket/refine/model
    python scripts/bundle_pocket.py output/pocket

Every number of the card comes from the run's files: done.json of each stage, metrics.json of the evaluation, the
config.json and the header of the weights. A score of other weights is refused.
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lavish.checkpoints import hf
from lavish.common.errors import CheckpointError, LavishError
from lavish.datasets.scenes.phrases import CANNOT_SEE, NO_PICTURE
from lavish.datasets.scenes.world import COLOURS, PATTERNS, SHAPES, SIZES, sample_scene
from lavish.runners.recipe import CONFIG_FILE, METRICS_FILE, Cost, read_cost, weights_sha256
from lavish.tasks.scenes import SceneDataConfig

ROOT = Path(__file__).resolve().parent.parent
POCKET = ROOT / "src" / "lavish" / "pocket"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
MAX_WEIGHT_BYTES = 16_000_000
HEADLINES = {
    "vqa": "VQA (count, colour, shape, size, relation, existence, number, comparison, absence): exact match",
    "box_hit": "phrase to box: IoU of at least 0.5",
    "caption_f1": "captions: F1 of (size, colour, shape) and number",
}
DEFAULT_MAX_ITEMS = signature(sample_scene).parameters["max_items"].default
MEASURES = {"caption": "F1 of the facts", "grounded_caption": "F1 of the facts", "locate": "box hit"}


CARD = """\
# The pocket model

A CogVLM2-shaped network of {parameters} parameters ({megabytes}) that comes with lavish, so that every command works at
once and offline. lavish trained it from nothing on pictures that lavish drew. It is there to try the tools and to test
them: it knows nothing of photographs.

## What it has seen

Pictures of {side} x {side} px:

- up to {max_items} shapes ({shapes}), some partly covered,
- in {num_colours} colours ({colours}) and sizes ({item_sizes}),
- on light backgrounds ({patterns}),
- on some of them a number of one to four digits.

Questions and answers are in English and Chinese, with the templates `chat` (sentences), `vqa` (a word or two) and
`base` (boxes). It captions, counts, names colours, shapes and sizes, says where things are to one another, whether
something is there, which of two is larger, and what number is written; it points at what a phrase names
(`[[x0,y0,x1,y1]]`, thousandths of the picture) and says what a box holds. Asked about what is not there it answers
"{cannot_see}"; without a picture, "{no_picture}".

## What it is not for

Photographs, screenshots, documents, text other than one number, other shapes or colours, and any question of
knowledge: it has never seen them, and what it answers means nothing. Questions in other words than those of its
training may be misunderstood. Every picture is squashed to {side} x {side} px, so what is small in a large one is lost.
A conversation goes on for up to {max_turns} turns.

## Measured

{num_questions} questions about scenes that it was not trained on ({held_out}); greedy answers, {dtype};
{versions}.

{headlines}

{scores}

## Network

{network}

## Training

{costs}

CPU-hours are summed over the training processes. `projects/pocket/README.md` says how these weights were made; the same
way again goes

```
lavish train projects/pocket/train.yaml
lavish evaluate projects/pocket/evaluate.yaml --set model.path=output/pocket/{stage}/model
python scripts/bundle_pocket.py output/pocket
```

Licence: Apache-2.0, as the code.
"""


def stage_folders(last: Path) -> Iterator[Path]:
    """Give the folders of the stages that a stage was made from, the earliest first, and it itself at the end."""
    config = OmegaConf.load(last / CONFIG_FILE)
    seen = []
    for key in ("tower_from", "decoder_from"):
        name = OmegaConf.select(config, f"task.{key}")
        if name and name not in seen:
            seen.append(name)
            yield from stage_folders(last.parent / name)
    yield last


def costs_of(last: Path) -> dict[str, Cost]:
    """Give what each stage took, by its name.

    Raises: CheckpointError where a stage has not finished.
    """
    costs: dict[str, Cost] = {}
    for folder in stage_folders(last):
        cost = read_cost(folder)
        if cost is None:
            raise CheckpointError(f"{folder} has not finished: it has no done.json. Run `lavish train` to its end.")
        costs[folder.name] = cost
    return costs


def read_metrics(path: Path, model: Path) -> dict[str, Any]:
    """Read the scores of an evaluation.

    Raises: CheckpointError when there are none, or they are of other weights than the model's.
    """
    command = f"lavish evaluate projects/pocket/evaluate.yaml --set model.path={model}"
    if not path.is_file():
        raise CheckpointError(f"{path} is not there: the model has no scores yet. Run `{command}`.")
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if metrics["record"]["weights_sha256"] != weights_sha256(model):
        raise CheckpointError(f"{path} holds the scores of other weights than {model}. Run `{command}`.")
    return metrics


def score_table(metrics: dict[str, Any]) -> str:
    """Give the table of scores: a row a task, a column a language."""
    languages = list(metrics["languages"])
    rows = [["task", "measure", "questions", "score", *languages]]
    rows.append(["---", "---", *["---:"] * (2 + len(languages))])
    for task, score in metrics["tasks"].items():
        by_language = [metrics["languages"][language].get(task) for language in languages]
        cells = ["" if value is None else f"{value:.1%}" for value in (score, *by_language)]
        rows.append([task, MEASURES.get(task, "exact match"), str(metrics["counts"][task]), *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def cost_table(costs: dict[str, Cost]) -> str:
    """Give the table of what the stages took, with their sum."""
    sums = (sum(values) for values in zip(*(vars(cost).values() for cost in costs.values()), strict=True))
    rows = [["stage", "images", "steps", "CPU-hours", "wall time, hours"], ["---", "---:", "---:", "---:", "---:"]]
    for name, cost in {**costs, "all": Cost(*sums)}.items():
        hours = f"{cost.cpu_seconds / 3600:.2f}", f"{cost.wall_seconds / 3600:.2f}"
        rows.append([name, f"{cost.num_samples:,}", f"{cost.steps:,}", *hours])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def card(
    config: dict[str, Any],
    num_parameters: int,
    num_bytes: int,
    metrics: dict[str, Any],
    costs: dict[str, Cost],
    max_turns: int,
) -> str:
    """Fill in the model's card."""
    vision, record = config["vision_config"], metrics["record"]
    scenes = record["datasets"]["scenes"]
    sizes = scenes.get("picture_sizes")
    headlines = [f"- {text}: **{metrics[name]:.1%}**" for name, text in HEADLINES.items() if name in metrics]
    grid = vision["image_size"] // vision["patch_size"]
    network = (
        f"Tower: {vision['num_hidden_layers']} layers, width {vision['hidden_size']}, patches of "
        f"{vision['patch_size']} px ({grid} x {grid}), merged 2 x 2.\n"
        f"Decoder: {config['num_hidden_layers']} layers with visual experts, width {config['hidden_size']}, "
        f"{config['num_attention_heads']} query and {config['num_multi_query_heads']} key/value heads,\n"
        f"{config['vocab_size']:,} tokens, a context of {config['max_position_embeddings']:,}."
    )
    return CARD.format(
        parameters=f"{num_parameters / 1e6:.2f} M",
        megabytes=f"{num_bytes / 1e6:.1f} MB",
        side=vision["image_size"],
        max_items=scenes.get("scene", {}).get("max_items", DEFAULT_MAX_ITEMS),
        shapes=", ".join(SHAPES),
        num_colours=len(COLOURS),
        colours=", ".join(COLOURS),
        item_sizes=", ".join(SIZES),
        patterns=", ".join(PATTERNS),
        cannot_see='" or "'.join(CANNOT_SEE.values()),
        no_picture='" or "'.join(NO_PICTURE.values()),
        num_questions=f"{sum(metrics['counts'].values()):,}",
        held_out=f"seed {scenes['seed']}" + (f", drawn at {', '.join(map(str, sizes))} px" if sizes else ""),
        dtype=f"{record['dtype']} on {record['device'].split(':')[0]}",
        versions=", ".join(f"{name} {version}" for name, version in record["versions"].items()),
        headlines="\n".join(headlines),
        scores=score_table(metrics),
        network=network,
        costs=cost_table(costs),
        stage=list(costs)[-1],
        max_turns=max_turns,
    )


def bundle(run: Path, stage: str, metrics_path: Path, target: Path) -> None:
    """Copy the model of a stage into `target`, with its card and scores; what else stands there is kept."""
    model = run / stage / "model"
    absent = [name for name in FILES if not (model / name).is_file()]
    if absent:
        raise CheckpointError(f"{model} has no {', '.join(absent)}; is the stage finished?")
    num_bytes = (model / "model.safetensors").stat().st_size
    if num_bytes > MAX_WEIGHT_BYTES:
        raise CheckpointError(f"{model}: the weights take {num_bytes:,} bytes, and at most {MAX_WEIGHT_BYTES:,} fit.")
    costs = costs_of(run / stage)
    metrics = read_metrics(metrics_path, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    tensors = hf.read(model)
    num_parameters = sum(math.prod(tensors.meta(name)[0]) for name in tensors if not name.endswith("inv_freq"))
    trained = OmegaConf.load(run / stage / CONFIG_FILE)
    max_turns = OmegaConf.select(trained, "datasets.scenes.max_turns", default=SceneDataConfig.max_turns)
    text = card(config, num_parameters, num_bytes, metrics, costs, max_turns)
    target.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        partial = target / f".{name}.partial"
        shutil.copyfile(model / name, partial)
        partial.replace(target / name)
    (target / "README.md").write_text(text, encoding="utf-8")
    scores = json.dumps(metrics, indent=2, ensure_ascii=False)
    (target / METRICS_FILE).write_text(scores + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run: run.output_dir of the training recipe")
    parser.add_argument("--stage", default="refine", help="stage whose model is published (default: refine)")
    parser.add_argument("--metrics", type=Path, help="scores of it (default: RUN/evaluation/metrics.json)")
    parser.add_argument("--target", type=Path, default=POCKET, help="where to (default: the package)")
    options = parser.parse_args()
    try:
        bundle(options.run, options.stage, options.metrics or options.run / "evaluation" / METRICS_FILE, options.target)
        from lavish.inference.load import load

        print(f"{load(options.target)} is published in {options.target}; its card is README.md there.")
    except LavishError as error:
        print(f"bundle_pocket: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
