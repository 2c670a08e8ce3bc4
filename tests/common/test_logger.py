"""LAVIS's MetricLogger and SmoothedValue, as tasks written for it use them."""

import logging

import pytest
import torch

from lavish.common.logger import MetricLogger, SmoothedValue


def test_a_number_over_a_loop() -> None:
    meter = SmoothedValue(window_size=2, fmt="{value:.1f} {avg:.1f} {max:.1f} {median:.1f} {global_avg:.2f}")
    for value in (1.0, 4.0, 2.0):
        meter.update(value)
    meter.update(5.0, n=3)
    assert str(meter) == "5.0 3.5 5.0 2.0 3.67"
    meter.synchronize_between_processes()
    assert meter.global_avg == pytest.approx(22 / 6)
    assert str(SmoothedValue()) == "0.0000 (0.0000)"


def test_numbers_by_name(caplog: pytest.LogCaptureFixture) -> None:
    metrics = MetricLogger(delimiter="  ")
    metrics.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.6f}"))
    with caplog.at_level(logging.INFO):
        for at in metrics.log_every(range(5), 2, "Train: [0]"):
            metrics.update(loss=torch.tensor(float(at)), lr=1e-4)
    assert [line.split(" (")[0] for line in caplog.messages][1] == "Train: [0] [2] lr: 0.000100  loss: 1.0000"
    assert len(caplog.messages) == 3
    assert metrics.global_avg() == "lr: 0.0001  loss: 2.0000"
    assert metrics.loss.global_avg == metrics.meters["loss"].global_avg == 2.0
    with pytest.raises(AttributeError, match="has no number 'acc'"):
        metrics.acc  # noqa: B018
