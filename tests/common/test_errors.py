"""The error tree and the suggestion that ends its messages."""

import pytest

from lavish.common import errors
from lavish.common.errors import did_you_mean


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("blip_captoin", ["blip_vqa", "blip_caption"], " Did you mean 'blip_caption'?"),
        ("CogVLM-2", ["cogvlm2", "glm4v_9b"], " Did you mean 'cogvlm2'?"),
        ("max-epoch", ["max_epoch", "max_iters"], " Did you mean 'max_epoch'?"),
        ("zebra", ["cogvlm2", "glm4v_9b"], ""),
        ("", ["cogvlm2"], ""),
        ("x", [], ""),
    ],
)
def test_did_you_mean_gives_the_nearest_name_or_nothing(name: str, known: list[str], expected: str) -> None:
    assert did_you_mean(name, known) == expected


@pytest.mark.parametrize(
    ("refined", "builtin"),
    [
        (errors.MissingKeys, ValueError),
        (errors.UnsafeCheckpoint, ValueError),
        (errors.ConfigError, ValueError),
        (errors.PromptError, ValueError),
        (errors.MediaError, ValueError),
        (errors.OutputError, OSError),
        (errors.DataError, ValueError),
        (errors.TrainingError, ArithmeticError),
        (errors.MissingDependency, ImportError),
    ],
)
def test_each_error_is_also_the_builtin_that_it_refines(refined: type, builtin: type) -> None:
    assert issubclass(refined, builtin)
    assert issubclass(refined, errors.LavishError)
