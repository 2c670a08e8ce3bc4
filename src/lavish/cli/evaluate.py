"""`lavish evaluate`: score a model as a recipe says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.terminal import Progress, console, say, working
from lavish.common import dist
from lavish.common.errors import ConfigError

HEADLINES = {"vqa": "VQA, exact match", "box_hit": "boxes, IoU at least 0.5", "caption_f1": "captions, F1 of the facts"}


def command(
    recipe: options.Recipe = None,
    more: options.More = None,
    cfg_path: options.CfgPath = None,
    overrides: options.Overrides = None,
    plugins: options.Plugins = None,
    offline: options.Offline = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare", metavar="RUN_A RUN_B", help="Compare the folders of two evaluations, sample by sample."
        ),
    ] = None,
    anew: Annotated[
        bool, typer.Option("--force", help="Delete what another recipe left in the folder, instead of refusing.")
    ] = False,
) -> None:
    """Score a model as a recipe says, on its own or on the processes of torchrun.

    Killed, the same command goes on: what is answered is not asked again. Results, metrics with confidence intervals
    and a report go into run.output_dir. A recipe of LAVIS runs as it is; with model.path any model that lavish opens is
    asked. --compare shows the differences between two such folders, and whether they are more than chance.
    """
    if compare is not None:
        if recipe is not None or cfg_path is not None or overrides:
            raise ConfigError("--compare takes the folders of two evaluations, and no recipe.")
        _compare(*compare)
        return
    path, changes = options.recipe_of(recipe, cfg_path, overrides, more)
    with working("Importing ..."):
        from lavish.common.plugins import load_plugins
        from lavish.runners import evaluation
    load_plugins(plugins or ())
    config = evaluation.open_evaluation(path, changes)
    if config is None:
        _score_scenes(path, changes)
        return
    bar = Bar()
    try:
        found = evaluation.evaluate(config, force=anew, progress=bar)
    except KeyboardInterrupt:
        bar.close()
        say("Interrupted. The same command goes on: what is answered is kept.")
        raise
    finally:
        bar.close()
    if dist.is_main():
        show_splits(json.loads((found.folder / evaluation.METRICS_FILE).read_text(encoding="utf-8"))["splits"])
        for name in (evaluation.METRICS_FILE, "results.jsonl", "report.html"):
            console().print(str(found.folder / name), markup=False, soft_wrap=True)


def _score_scenes(path: str, changes: list[str]) -> None:
    """Score a model with a task that asks by itself."""
    from lavish.runners import recipe as recipes

    config = recipes.load_recipe(path, changes)
    bar = Bar()
    try:
        summary = recipes.evaluate(config, bar)
    finally:
        bar.close()
    show_scores(summary)
    folder = Path(config.run.output_dir)
    for name in ("answers.jsonl", recipes.METRICS_FILE):
        if (folder / name).is_file():
            console().print(str(folder / name), markup=False, soft_wrap=True)


def _compare(first: str, second: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    with working("Importing ..."):
        from lavish.runners.evaluation_compare import compare_runs, largest_changes
        from lavish.tasks.metrics.measure import NUM_RESAMPLES
    shown = console()
    found = compare_runs(first, second)
    for split in dict.fromkeys(one.split for one in found):
        shown.print(f"{split}: B - A, paired over the same samples", style="bold", markup=False)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
        for title in ("metric", "A", "B", "difference", "95 % interval", "p", "better", "worse", "samples"):
            table.add_column(title, justify="left" if title == "metric" else "right")
        for one in (one for one in found if one.split == split):
            low, high = one.difference.interval
            numbers = (one.first, one.second, one.difference.difference)
            counts = (one.num_better, one.num_worse, one.num_samples)
            name = one.metric if one.higher_is_better else f"{one.metric} (lower is better)"
            span = f"{low:+.4g} to {high:+.4g}"
            p_value = one.difference.p_value
            least = 2 / NUM_RESAMPLES  # one resample, doubled
            odds = f"{p_value:.3f}" if p_value >= least else f"< {least:.3f}"
            table.add_row(name, *(f"{value:.4g}" for value in numbers), span, odds, *map(str, counts))
        shown.print(table)
    changes = largest_changes(first, second)
    if changes:
        shown.print("samples that change most", style="bold")
    for one in changes:
        shown.print(f"{one.split}, sample {one.index} {one.question}", style="dim", markup=False, soft_wrap=True)
        for name, score, answer in zip("AB", one.scores, one.answers, strict=True):
            shown.print(f"  {name} {score:.4g}  {answer}", markup=False, soft_wrap=True)
    shown.print(f"A: {first}\nB: {second}", markup=False, soft_wrap=True)


class Bar:
    """The progress of the evaluation; its length is known with the first answers."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress(total, title="evaluate").__enter__()
        self._progress.advance(done - self._progress.done)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.__exit__()


def show_scores(summary: dict[str, Any]) -> None:
    """Print the scores per task and language, then the headlines."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    languages = list(summary["languages"])
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("task")
    for title in ("questions", "score", *languages):
        table.add_column(title, justify="right")
    for task, value in summary["tasks"].items():
        by_language = [summary["languages"][language].get(task) for language in languages]
        cells = ["" if score is None else f"{score:.1%}" for score in (value, *by_language)]
        table.add_row(task, str(summary["counts"][task]), *cells)
    shown = console()
    shown.print(table)
    for name, title in HEADLINES.items():
        if name in summary:
            shown.print(f"{title}: {summary[name]:.1%}", style="bold")


def show_splits(splits: dict[str, Any]) -> None:
    """Print the metrics of each split with their intervals."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = console()
    for split, summary in splits.items():
        shown.print(f"{split}: {summary['num_samples']:,} samples", style="bold", markup=False)
        if summary["metrics"]:
            table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
            table.add_column("metric")
            for title in ("value", "95 % interval", "samples"):
                table.add_column(title, justify="right")
            parts = {f"  {name}": entry for name, entry in summary.get("groups", {}).items()}
            for name, entry in {**summary["metrics"], **parts}.items():
                if parts and name == next(iter(parts)):
                    table.add_row(f"{summary['headline']} of", style="dim")
                interval = entry.get("interval")
                span = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
                table.add_row(name, f"{entry['value']:.4g}", span, str(entry.get("num_samples", "")))
            shown.print(table)
        for note in summary["notes"]:
            shown.print(note, style="dim", markup=False, soft_wrap=True)
