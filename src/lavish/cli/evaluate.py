"""`lavish evaluate`: score a model as a recipe says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lavish.cli import options
from lavish.cli.terminal import Progress, console, working

HEADLINES = {"vqa": "VQA, exact match", "box_hit": "boxes, IoU at least 0.5", "caption_f1": "captions, F1 of the facts"}


def command(
    recipe: options.Recipe,
    more: options.More = None,
    overrides: options.Overrides = None,
) -> None:
    """Score a model on the held-out questions of a recipe. Without model.path the bundled model is scored.

    Every answer is written to answers.jsonl, the scores to metrics.json, both into the recipe's run.output_dir.
    """
    with working("Importing ..."):
        from lavish.runners import recipe as recipes
    config = recipes.load_recipe(recipe, [*(overrides or ()), *(more or ())])
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
