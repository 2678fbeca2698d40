"""A step of fake tensors, which have no elements: it makes the state that a first step makes, and computes nothing.

That is what tools ask for which estimate a training's memory before it exists.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..core import shards, tensors
from ..core.rule import Group
from ..state.schema import fit
from .groups import GroupedOptimizer, label, layout_of


def is_simulation(groups: Sequence[Group]) -> bool:
    """Whether there is a parameter with a gradient, and all such parameters are fake tensors."""
    params = [param for group in groups for param in group["params"] if param.grad is not None]
    return len(params) > 0 and all(_mode_of(param) is not None for param in params)


def simulate(optimizer: GroupedOptimizer, groups: Sequence[Group]) -> None:
    """Makes the state of every parameter with a gradient that has none, of fake tensors.

    Args:
        optimizer: whose state it is.
        groups: as they were read for this step; parameters with a gradient are fake.

    Raises:
        TypeError, ValueError: a parameter that no step could serve; no state has been made then.
    """
    made: dict[Tensor, dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None and not optimizer.state.get(param):
                name = label(group, index, i)
                tensors.parameter(name, shards.local(param), at_step=False)
                layout = layout_of(optimizer, name, param, group)
                with _mode_of(param):
                    made[param] = fit(layout, {}, seed=0, param_id=0).changes  # which draws nothing
    optimizer.state.update(made)


def _mode_of(param: Tensor) -> Any:
    """The mode that a fake tensor belongs to, or None for another one. A DTensor is what its part is."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    part = shards.local(param)
    return part.fake_mode if module is not None and isinstance(part, module.FakeTensor) else None
