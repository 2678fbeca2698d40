"""What ranks run in the tests with torchtitan: the training of examples/torchtitan_optimizer.py."""

from __future__ import annotations

from typing import Any


def _config(groups: list[tuple[str, str, dict[str, Any]]], implementation: str) -> Any:
    from torchtitan.components.optimizer import ParamGroupConfig

    from signadam_ext.integrations.torchtitan import SignOptimizersContainer

    return SignOptimizersContainer.Config(
        param_groups=[
            ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs=options)
            for pattern, name, options in groups
        ],
        implementation=implementation,
    )


def trained(groups: Any, implementation: str, out: str, steps: int, end: int) -> list[int]:
    """Trains up to a step and saves there. Returns the steps before and after, and how many optimizers there are."""
    from examples.torchtitan_optimizer import Training

    training = Training(_config(groups, implementation), out, steps)
    start = training.step
    training.run(end)
    return [start, training.step, len(training.optimizers)]


def saved_again(groups: Any, implementation: str, out: str, steps: int, other: str) -> None:
    """Loads a checkpoint and saves it elsewhere, without a step in between."""
    from examples.torchtitan_optimizer import Training

    training = Training(_config(groups, implementation), out, steps)
    training.checkpointer.folder = other
    training.checkpointer.save(training.step, last_step=True)
