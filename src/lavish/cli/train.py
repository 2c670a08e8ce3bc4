"""`lavish train`: run a recipe, in its stages, and go on where it was interrupted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lavish.cli import options
from lavish.cli.terminal import console, human_bytes, human_count, human_seconds, progress_bar, say
from lavish.common.schema import field_help
from lavish.runners.schema import RunConfig

if TYPE_CHECKING:
    from lavish.runners.dry_run import Plan
    from lavish.runners.recipe import Cost
    from lavish.runners.runner_base import Progress, RunnerBase

HEARTBEAT_S = 10.0


def command(
    recipe: options.Recipe = None,
    more: options.More = None,
    cfg_path: options.CfgPath = None,
    overrides: options.Overrides = None,
    plugins: options.Plugins = None,
    offline: options.Offline = False,
    only: Annotated[
        str | None, typer.Option(metavar="STAGE", help="Run this stage; those that it starts from are finished.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Go on in a folder that was begun with other settings.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Build and probe, say what learns, memory, steps and time, and write nothing."),
    ] = False,
    check: Annotated[bool, typer.Option("--check", help="Check the recipe, say what would run, and stop.")] = False,
) -> int | None:
    """Train as a recipe says. Interrupted or killed, the same command goes on from the newest checkpoint."""
    path, changes = options.recipe_of(recipe, cfg_path, overrides, more)
    from lavish.common import dist
    from lavish.common.plugins import load_plugins
    from lavish.runners import recipe as recipes

    load_plugins(plugins or ())
    config = recipes.open_recipe(path, changes)
    if check:
        _show_plan(recipes.check(config, only=only))
        return None
    if dry_run:
        from lavish.runners.dry_run import plan

        for name, one in recipes.check(config, only=only):
            _show_dry_run(plan(one, name))
        return None
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of saving a model, in the middle of ours
    screen = Screen()
    try:
        with screen:
            folders = recipes.train(config, only=only, report=screen, force=force)
    except KeyboardInterrupt:
        say("Interrupted. The same command goes on from the newest checkpoint; nothing before it is lost.")
        raise
    if not dist.is_main():
        return None
    _show_costs(screen.costs)
    for name, folder in folders.items():
        where = folder / "model" if (folder / "model").is_dir() else folder
        console().print(f"{name}: {where}", markup=False, soft_wrap=True)
    return None


def _keys() -> str:
    """Give the keys of `run:` as paragraphs of the help; what they say is no markup."""
    from rich.markup import escape

    return "\n\n".join(
        f"[bold]{entry.key}[/bold] {escape(f'({entry.type} = {entry.default}) {entry.help}')}"
        for entry in field_help(RunConfig, "run")
    )


command.__doc__ = f"{command.__doc__}\n\nKeys of the recipe's section [bold]run[/bold]:\n\n{_keys()}"


class Screen:
    """What one sees of a training: a bar on a terminal, elsewhere a line every ten seconds; all on stderr."""

    def __init__(self) -> None:
        self.costs: dict[str, Cost] = {}
        self._spoken_s = 0.0
        self._bar = progress_bar("{task.fields[losses]}", "[dim]{task.fields[speed]}", left="{task.fields[left]}")

    def __enter__(self) -> Screen:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def started(self, stage: str, runner: RunnerBase) -> Progress:
        """A stage starts, or goes on from a checkpoint, which is found at its first step."""
        say(f"{stage}: {runner.num_steps} steps on {runner.device}, in {runner.folder.path}")
        task = None
        if self._bar:
            task = self._bar.add_task(stage, total=runner.num_steps, losses="", speed="", left="")
        first_step, first_samples, started_s = -1, 0, time.monotonic()
        mean_loss = 0.0

        def after_step(step: int, num_steps: int, losses: dict[str, float]) -> None:
            nonlocal first_step, first_samples, started_s, mean_loss
            now = time.monotonic()
            if first_step < 0:  # the speed is counted from the end of the first step, which also compiles and warms up
                first_step, first_samples, started_s, mean_loss = step, runner.num_samples, now, losses["loss"]
                if step > 1:
                    say(f"{stage}: goes on from step {step - 1}")
            mean_loss += 0.05 * (losses["loss"] - mean_loss)
            elapsed = max(now - started_s, 1e-9)
            done = step - first_step
            speed = f"{(runner.num_samples - first_samples) / elapsed:.1f} samples/s" if done else ""
            left = human_seconds((num_steps - step) * elapsed / done) if done else "?"
            shown = f"loss {mean_loss:.3f}, lr {runner.lr:.1e}, {human_bytes(runner.memory_bytes)}"
            self._show(task, stage, step, num_steps, shown, speed, left)

        return after_step

    def _show(self, task: Any, stage: str, step: int, num_steps: int, losses: str, speed: str, left: str) -> None:
        if self._bar:
            self._bar.update(task, completed=step, losses=losses, speed=speed, left=left)
        elif time.monotonic() - self._spoken_s >= HEARTBEAT_S or step == num_steps:
            self._spoken_s = time.monotonic()
            say(f"{stage}: step {step} of {num_steps}, {losses}{f', {speed}' if speed else ''}, {left} left")

    def finished(self, stage: str, folder: Path, cost: Cost, *, is_new: bool) -> None:
        """A stage is complete, now or since an earlier call."""
        self.costs[stage] = cost
        if not is_new:
            say(f"{stage}: finished before, in {folder}")


def _show_plan(stages: list[tuple[str, Any]]) -> None:
    from lavish.runners.recipe import read_cost, run_config

    for name, config in stages:
        folder = Path(run_config(config).output_dir)
        state = "finished" if read_cost(folder) else "begun" if any(folder.glob("checkpoint_*")) else "to do"
        console().print(f"{name}: {state}, in {folder}", markup=False, soft_wrap=True)
    console().print("The recipe is right.")


def _show_dry_run(plan: Plan) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    titles = ("learns", "frozen", "weights", "gradients", "optimizer")
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column(plan.name)
    for title in titles:
        table.add_column(title, justify="right")
    kinds = ("trained", "frozen", "weight_bytes", "gradient_bytes", "optimizer_bytes")
    rows = [(name, [getattr(part, kind) for kind in kinds]) for name, part in plan.parts.items()]
    rows.append(("all", [plan.total(kind) for kind in kinds]))
    for name, (trained, frozen, *sizes) in rows:
        table.add_row(name, human_count(trained), human_count(frozen), *(human_bytes(size) for size in sizes))
    shown = console()
    shown.print(table)
    memory = f"{human_bytes(plan.memory_bytes)} at the peak; activations take {human_bytes(plan.activation_bytes)}"
    shown.print(f"memory of one process: about {memory}", markup=False, soft_wrap=True)
    shown.print(f"fits on: {', '.join(plan.fits) or 'none of the common GPUs'}", markup=False, soft_wrap=True)
    for note in plan.notes:
        shown.print(note, markup=False, soft_wrap=True)
    seconds = plan.num_steps * plan.step_seconds
    shown.print(
        f"{plan.num_steps:,} steps, {plan.num_samples:,} samples; a step takes {human_seconds(plan.step_seconds)} on "
        f"{plan.device}, the run {human_seconds(seconds)}",
        markup=False,
        soft_wrap=True,
    )


def _show_costs(costs: dict[str, Cost]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    table.add_column("stage")
    for title in ("samples", "steps", "CPU-hours", "wall time"):
        table.add_column(title, justify="right")
    rows = [(name, cost.num_samples, cost.steps, cost.cpu_seconds, cost.wall_seconds) for name, cost in costs.items()]
    if len(rows) > 1:
        columns = list(zip(*rows, strict=True))[1:]
        rows.append(("all", sum(columns[0]), sum(columns[1]), sum(columns[2]), sum(columns[3])))
    for name, num_samples, steps, cpu_seconds, wall_seconds in rows:
        table.add_row(name, f"{num_samples:,}", f"{steps:,}", f"{cpu_seconds / 3600:.2f}", human_seconds(wall_seconds))
    console().print(table)
