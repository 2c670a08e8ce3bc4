"""docs/learning.md names every recipe that draws its data, and its commands name recipes that are there and fit."""

import re
import shlex
from pathlib import Path

import pytest

from lavish.runners.evaluation import open_evaluation
from lavish.runners.recipe import open_recipe

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "learning.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("lavish train", "lavish evaluate"))
]


def test_every_recipe_is_named() -> None:
    likewise = {"clip_qwen", "minigpt4_qwen"}
    recipes = [*ROOT.glob("projects/*/train/scenes*.yaml"), *ROOT.glob("projects/*/train/new_colour.yaml")]
    absent = [path for path in recipes if str(path.relative_to(ROOT)) not in PAGE and path.parts[-3] not in likewise]
    assert not absent
    assert all(f"`{family}`" in PAGE for family in likewise)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_of_recipes(command: str) -> None:
    _, verb, *words = shlex.split(command)
    recipe, *options = [word for word in words if not word.startswith("--")]
    path = ROOT / recipe
    # The second is None where the task opens the model by itself; a recipe that is none raises.
    assert (open_recipe if verb == "train" else open_evaluation)(path, options) is not None or "pocket" in recipe
