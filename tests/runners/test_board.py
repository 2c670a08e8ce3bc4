"""TensorBoard gets what the log gets, where it is installed."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from toy_task import config, runner


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="needs tensorboard")
def test_the_curves_are_those_of_the_log(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found]

    toy = runner(config(tmp_path))
    toy.train()
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    found = [(event.step, event.value) for event in curves.Scalars("train/loss")]
    expected = [(line["step"], line["loss"]) for line in toy.folder.read_log()]
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_a_run_does_without(tmp_path: Path) -> None:
    runner(config(tmp_path)).train()
    assert not (tmp_path / "tensorboard").exists()
