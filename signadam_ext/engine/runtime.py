"""What an optimizer keeps beside groups and state: plans, and what they do at each step."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..core.hyperparameters import Hyperparameters
from .step_lock import StepLock

if TYPE_CHECKING:
    from .plan import Plan


class StepDriver(Protocol):
    """Takes an optimizer's steps in place of ``step()``: inside backward, for example."""

    def step(self, closure: Callable[[], float] | None) -> float | None:
        """What ``optimizer.step()`` does while this drives it."""

    def zero_grad(self) -> None:
        """What ``optimizer.zero_grad()`` does beside what it does to ``param.grad``."""

    def extend(self, params: Sequence[Tensor]) -> None:
        """Takes in the parameters of a new group."""

    def updated(self, param: Tensor) -> Tensor:
        """The tensor that steps update for a parameter, beside which its state lies."""


@dataclass(eq=False)
class Runtime:
    """All of an optimizer that changes and is no group, state or hook, as one attribute of the instance.

    Trainers wrap an optimizer in an object that poses as its class and hands on what it does not find itself. What the
    class defines it finds there; this object it does not, so that both share one. It is not copied and not pickled.

    Attributes:
        owner: the optimizer itself, whatever poses as it.
        hyperparameters: reads and checks the groups.
        lock: held during a step.
        plan, plan_key: of all parameters, and what the plan depends on beside what is compared each step.
        settings: what steps take from groups beside scalars, with what tells whether it still holds.
        plans_alone: the same of single parameters, by their ids.
        places: where each parameter is: its group's index, and its own in the group, by its id.
        coded: shape, and addresses of the moments, of each parameter with packed ones, by its id. Their size alone
            would not tell that a parameter has another shape.
        observes: whether steps gather what ``statistics()`` tells.
        round: number of the last step.
        driver: takes the steps, while there is one.
        has_warned: whether the variance of few bits has been warned of.
        has_compared: whether ranks have been found to have the same optimizer, as far as they share parameters.
        has_shards: whether a parameter is a DTensor.
        begins_on_device: whether steps begin on the device, where they can.
        skipped_steps, skips_there: how many steps were left out, by the host and, 0-dim int64, by the device.
        last_grad_norm: of the last step, a number or, 0-dim float64, on the device.
        number: by which a compiled graph knows it; no other has had it in this process.
    """

    owner: weakref.ref[Optimizer]
    hyperparameters: Hyperparameters
    lock: StepLock = field(default_factory=StepLock)
    plan: Plan | None = None
    plan_key: Any = None
    settings: tuple[Any, Any, Any] = (None, None, None)
    plans_alone: dict[int, tuple[Plan, Any]] = field(default_factory=dict)
    places: dict[int, tuple[int, int]] = field(default_factory=dict)
    coded: dict[int, tuple[torch.Size, tuple[int, ...]]] = field(default_factory=dict)
    observes: bool = False
    round: int = 0
    driver: StepDriver | None = None
    has_warned: bool = False
    has_compared: bool = False
    has_shards: bool = False
    begins_on_device: bool = False
    skipped_steps: int = 0
    skips_there: Tensor | None = None
    last_grad_norm: float | Tensor | None = None
    number: int = field(default_factory=itertools.count().__next__)

    def __post_init__(self) -> None:
        _RUNTIMES[self.number] = self

    @contextlib.contextmanager
    def between_steps(self) -> Iterator[None]:
        """A step on another thread is of before or of after.

        Raises:
            RuntimeError: that step runs a confidence function, which may wait for this thread.
        """
        self.lock.refuse_waiting(
            "the state was asked for while a step on another thread runs a confidence function: does that function "
            "wait for this thread?"
        )
        with self.lock.held:
            yield

    def forget_plans(self) -> None:
        self.plan = None
        self.plan_key = None
        self.plans_alone = {}
        self.places = {}
        self.coded = {}


_RUNTIMES: weakref.WeakValueDictionary[int, Runtime] = weakref.WeakValueDictionary()


def runtime_of(number: int) -> Runtime:
    """The one of that number.

    Raises:
        RuntimeError: its optimizer is gone.
    """
    found = _RUNTIMES.get(number)
    if found is None:
        raise RuntimeError("the optimizer whose step was compiled is gone")
    return found
