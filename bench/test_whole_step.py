"""Whole training steps of the example's GPT, optimizers interleaved."""

import pytest

from . import whole_step


def test_whole_step(request: pytest.FixtureRequest, whole_steps: list[whole_step.Row]) -> None:
    quick = request.config.getoption("quick")
    whole_steps += whole_step.measure("tiny" if quick else "small", rounds=3 if quick else 60)
    assert {row["optimizer"] for row in whole_steps} == set(whole_step.optimizers())
