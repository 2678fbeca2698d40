"""What each hyperparameter may be, and its reading at every step, which costs nothing as long as nothing changes.

A class of optimizers declares its own hyperparameters by name in ``HYPERPARAMETERS``, each with a check: a function of
the name and the value that returns the value as Python has it, or raises. Groups are open to everyone between steps, so
their values are checked where they are read.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import checks, modifiers
from .formats import PARAM_STORAGES
from .options import BACKENDS
from .renamed import NAMES, VALUES, names_today, value_today

Check = Callable[[str, Any], Any]
Checks = Mapping[str, Check]


@dataclass(frozen=True)
class Number:
    """A finite number in ``[low, high)``; ``open_low`` and ``open_high`` say whether the bounds are outside."""

    low: float = 0.0
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True

    def __call__(self, name: str, value: Any) -> float:
        return checks.number(name, value, self.low, self.high, open_low=self.open_low, open_high=self.open_high)


@dataclass(frozen=True)
class Optional:
    """None, or what another check lets pass."""

    check: Check

    def __call__(self, name: str, value: Any) -> Any:
        return None if value is None else self.check(name, value)


@dataclass(frozen=True)
class Betas:
    """A decay in [0, 1) for each of ``names``, by which errors call them; the last is at least ``low``."""

    names: tuple[str, ...]
    low: float = 0.0

    def __call__(self, name: str, value: Any) -> tuple[float, ...]:
        if not isinstance(value, (tuple, list)) or len(value) != len(self.names):
            raise ValueError(
                f"{name}={checks.shown(value)}: must be a tuple of {len(self.names)}; {how_betas_are_given(self)}"
            )
        found = tuple(map(BETA, self.names, value))
        Number(self.low, 1.0)(self.names[-1], found[-1])
        # The same object where it holds Python's numbers already.
        return value if isinstance(value, tuple) and all(map(operator.is_, found, value)) else found


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def __call__(self, name: str, value: Any) -> str:
        return checks.one_of(name, value, self.names)


def _state_dtype(name: str, value: Any) -> Any:
    # Which names a rule has is its own affair, see Rule.forms. A list could be changed behind a plan's back.
    return tuple(value) if isinstance(value, list) else value


LEARNING_RATE: Check = checks.learning_rate
FLAG: Check = checks.flag
BETA = Number(0.0, 1.0)
SHARE = Number(0.0, 1.0, open_low=True)
ONE_BETA = Betas(("beta",))
TWO_BETAS = Betas(("betas[0]", "betas[1]"))
THREE_BETAS = Betas(("betas[0]", "betas[1]", "betas[2]"))

#: Of all optimizers, in the order in which they are checked; ``state_dtype`` only of those that have moments.
COMMON: Checks = {
    "lr": LEARNING_RATE,
    "weight_decay": Number(),
    "decoupled_weight_decay": FLAG,
    "weight_decay_kind": Optional(Choice(modifiers.WEIGHT_DECAY_KINDS)),
    "weight_decay_scale": Choice(tuple(modifiers.WEIGHT_DECAY_SCALES)),
    "lr_scale": modifiers.lr_scale,
    "caution": Optional(Choice(modifiers.CAUTIONS)),
    "base_lr": LEARNING_RATE,
    "largest_lr": LEARNING_RATE,
    "maximize": FLAG,
    "max_grad_norm": checks.max_grad_norm,
    "state_dtype": _state_dtype,
    "param_storage": Choice(tuple(PARAM_STORAGES)),
    "seed": checks.seed,
    "backend": Choice(("auto", *BACKENDS)),
}

#: A learning rate below zero by no more than this, in units of the largest it has been, is a scheduler's rounding.
ROUNDING = 1e-5
SMALLEST_ROUNDING = 1e-12


class Declaring(Protocol):
    """A class of optimizers, as far as it says what its groups hold."""

    HYPERPARAMETERS: ClassVar[Checks]
    COMMON: ClassVar[frozenset[str]]

    @classmethod
    def check_relations(cls, group: Mapping[str, Any]) -> None:
        """Raises on hyperparameters that make no sense together. Each by itself has been checked."""


def how_betas_are_given(check: Check | None, *, has_beta2: bool = False) -> str:
    """What is right where ``beta`` or ``betas`` is not; ``has_beta2``: of a rule that has that alone."""
    if has_beta2:
        return "this rule has one, beta2=..."
    count = len(check.names) if isinstance(check, Betas) else 0
    return (
        "this rule has none",
        "this rule has one, beta=...",
        "this rule has two, betas=(..., ...)",
        "this rule has three, betas=(..., ..., ...)",
    )[count]


def check_beta_names(optimizer: type[Declaring], given: Mapping[str, Any], *, folded: bool = False) -> None:
    """Raises where ``beta`` or ``betas`` is given to a rule that has the other, or ``beta2`` alone, or none.

    Args:
        optimizer: the class.
        given: hyperparameters by name.
        folded: whether ``betas=(beta,)`` is right as well, as it is in a group.

    Raises:
        TypeError: names the one that the rule has.
    """
    check = optimizer.HYPERPARAMETERS.get("betas")
    count = len(check.names) if isinstance(check, Betas) else 0
    wrong = {0: ("beta",) if folded else ("beta", "betas"), 1: ("betas",)}.get(count, ("beta",))
    for name in wrong:
        if name not in given:
            continue
        value = given[name]
        if count == 1 and folded and isinstance(value, (tuple, list)) and len(value) == 1:
            continue
        right = how_betas_are_given(check, has_beta2="beta2" in optimizer.HYPERPARAMETERS)
        raise TypeError(f"{name}={checks.shown(value)}: {right}")


def kept(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as it is kept and saved: NumPy's scalars are Python numbers, also in tuples; tensors are left tensors."""
    return {name: value if name == "params" else _kept(value) for name, value in group.items()}


def _kept(value: Any) -> Any:
    if type(value) in (tuple, list):
        items = [checks.plain(item) for item in value]
        return value if all(map(operator.is_, items, value)) else type(value)(items)
    return checks.plain(value)


def fold(group: dict[str, Any], has_one_beta: bool, *, warns: bool = True) -> None:
    """Moves what a group was given under another name to the name that groups keep; the other name is the newer.

    One ``beta`` is kept as ``betas=(beta,)``, where schedulers that cycle momentum look for it.
    """
    if has_one_beta and "beta" in group:
        group["betas"] = (group.pop("beta"),)
    if not group.keys().isdisjoint(NAMES):
        given = names_today({name: group.pop(name) for name in NAMES if name in group}, warns=warns)
        group.update(given)
    for name in group.keys() & VALUES.keys():
        group[name] = value_today(name, group[name], warns=warns)


@contextlib.contextmanager
def of_group(index: int, whose: str = "") -> Iterator[None]:
    """Prefixes errors with the index of the group, and whose group it is."""
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"group {index}{whose and ' '}{whose}: {error}") from None


def checked(optimizer: type[Declaring], group: Mapping[str, Any], on_device: bool = False) -> dict[str, Any]:
    """A group with its hyperparameters as Python numbers.

    Args:
        optimizer: the class.
        group: hyperparameters by name.
        on_device: whether a tensor on an accelerator stays one: nobody waits for what it holds.

    Raises:
        TypeError, ValueError: a hyperparameter that makes no sense, or is missing.
        RuntimeError: a backend that this installation cannot use.
    """
    checks_by_name = of_groups(optimizer)
    found = dict(group)
    for name, check in checks_by_name.items():
        value = _value(group, name)
        found[name] = value if on_device and stays_on_device(name, value) else check(name, value)
    optimizer.check_relations(found)
    return found


def stays_on_device(name: str, value: Any) -> bool:
    """Whether a hyperparameter is a tensor on an accelerator, or holds one, as all betas may.

    Raises:
        ValueError: of more than one element, or no floating-point number.
    """
    if isinstance(value, (tuple, list)):
        return any(stays_on_device(name, item) for item in value)
    if not isinstance(value, Tensor) or value.device.type in ("cpu", "meta") or name == "max_grad_norm":
        return False
    if value.numel() != 1 or not value.is_floating_point():
        raise ValueError(f"{name}={checks.shown(value)}: a tensor {name} must hold one floating-point number")
    return True


def of_groups(optimizer: type[Declaring]) -> dict[str, Check]:
    """The checks of what a group of this class holds."""
    common = {name: check for name, check in COMMON.items() if name != "state_dtype" or name in optimizer.COMMON}
    return {**common, **optimizer.HYPERPARAMETERS}


def _looked_at(optimizer: type[Declaring]) -> tuple[tuple[tuple[str, Check], ...], Callable[[Mapping[str, Any]], Any]]:
    """What groups of this class hold beside ``lr``: names with their checks, and all values of a group at once."""
    if optimizer not in _LOOKED_AT:
        found = tuple((name, check) for name, check in of_groups(optimizer).items() if name != "lr")
        _LOOKED_AT[optimizer] = found, operator.itemgetter(*(name for name, _ in found))
    return _LOOKED_AT[optimizer]


#: By class, which optimizers share; one that its user drops goes from here as well.
_LOOKED_AT: WeakKeyDictionary[type, Any] = WeakKeyDictionary()


def _value(group: Mapping[str, Any], name: str) -> Any:
    try:
        return group[name]
    except KeyError:
        raise _missing(name) from None


def _missing(name: str) -> ValueError:
    return ValueError(f"{name} is missing: a group must hold every hyperparameter")


class Hyperparameters:
    """The reading of an optimizer's groups, step after step.

    The learning rate, which schedulers change, is checked every time. What else has passed the last time and cannot
    have changed since is recognised by its identity, in C; only the rest is checked. Tensors and lists may have changed
    in place, so they are always looked at, and none is kept alive.
    """

    def __init__(self, optimizer: type[Declaring]) -> None:
        self._optimizer = optimizer
        self._checks, self._values = _looked_at(optimizer)
        self.on_device = False  # whether tensors on an accelerator stay tensors
        self._has_one_beta = optimizer.HYPERPARAMETERS.get("betas") is ONE_BETA
        self._seen: dict[int, tuple[Any, ...]] = {}
        self.version = 0  # another one after every reading of something that had changed, beside a learning rate

    def read(self, index: int, group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """The group, with Python numbers for hyperparameters: itself where nothing is to be converted.

        Args:
            index: of the group.
            group: as the optimizer holds it. Its one ``beta``, where it has one, becomes ``betas``.
            defaults: the optimizer's, to tell what is small beside its learning rate.

        Raises:
            TypeError, ValueError, RuntimeError: a hyperparameter that makes no sense, with the index of the group.
        """
        try:
            lr = group["lr"]
            if (
                type(lr) is float
                and 0.0 <= lr < math.inf
                and "beta" not in group
                and "weights" not in group  # and every other of NAMES
                and all(map(operator.is_, self._values(group), self._seen[index]))
            ):
                return group
        except KeyError:
            pass  # told below
        with of_group(index):
            return self._read(index, group, defaults)

    def _read(self, index: int, group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        if "beta" in group and not self._has_one_beta:
            check_beta_names(self._optimizer, group, folded=True)
        fold(group, self._has_one_beta)
        given = {"lr": _value(group, "lr")}
        stays = stays_on_device if self.on_device else _never
        lr = given["lr"]
        found = {"lr": lr if stays("lr", lr) else learning_rate(lr, group, defaults)}
        try:
            values = self._values(group)
        except KeyError as error:
            raise _missing(error.args[0]) from None
        seen = self._seen.get(index, (_UNSEEN,) * len(values))
        for (name, check), value, before in zip(self._checks, values, seen, strict=True):
            if value is not before:
                given[name], found[name] = value, value if stays(name, value) else check(name, value)
        converted = {name: value for name, value in found.items() if value is not given[name]}
        result = {**group, **converted} if converted else group
        if len(found) > 1:
            self._optimizer.check_relations(result)
            self.version += 1
            self._seen[index] = tuple(value if _is_fixed(value) else _UNSEEN for value in values)
        return result


def _never(name: str, value: Any) -> bool:
    return False


class _Unseen:
    """No value is this one."""


_UNSEEN = _Unseen()
_FIXED = frozenset((float, int, bool, str, type(None), torch.dtype))


def _is_fixed(value: Any) -> bool:
    """Whether a value that has passed stays as it is, so that its identity is enough to recognise it."""
    if type(value) is tuple:
        return all(type(item) in _FIXED for item in value)
    return type(value) in _FIXED or callable(value)


def learning_rate(value: Any, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> float:
    """A learning rate as the constructor takes it, or just below zero by a scheduler's rounding.

    Raises:
        TypeError, ValueError: another value.
    """
    found = checks.learning_rate("lr", value, math.inf)
    if found >= 0:
        return found
    size = max(_size(group.get("initial_lr")), _size(defaults.get("lr")))
    return checks.learning_rate("lr", found, ROUNDING * size + SMALLEST_ROUNDING)


def _size(value: Any) -> float:
    try:
        return abs(checks.number("initial_lr", value, -math.inf))
    except (TypeError, ValueError):
        return 0.0
