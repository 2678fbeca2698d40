"""What a rule is to the Python side: its name, its state, and the scalars its kernels take."""

from __future__ import annotations

import functools
from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import torch

from . import checks, formats
from .modifiers import decay_scalars, scale_of
from .symbols import is_nonzero, number

Group = Mapping[str, Any]
Scalars = dict[str, float]

# Names of the scalars of each beta.
_DECAYS = (("beta1", "one_minus_beta1"), ("beta2", "one_minus_beta2"), ("beta3", "one_minus_beta3"))

#: How a gated rule obtains its threshold; the names of ``signadam_ext._C.ThresholdPass``.
#: NONE: a scalar. SAME_PASS: from what earlier steps left, this step's sums are taken in the same pass. PASS_BEFORE:
#: from this step's, in a launch of its own before the update.
THRESHOLD_PASSES = ("NONE", "SAME_PASS", "PASS_BEFORE")


@dataclass(frozen=True)
class Rule:
    """One update rule, under the name its functor, its Triton twin and its reference function share.

    Attributes:
        name: name of the rule on every backend.
        moments: names of the state tensors, in the order of the kernels' ``m``, ``v`` and ``x``.
        bound: what ``|m|`` never exceeds, so that few bits hold it without a scale: codes q stand for
            ``q * bound / L``. None where there is no such number.
        unbounded: why there is none, for errors.
        codes_bound: what codes of the method's other forms are made for, where this one has no bound itself.
        scalars: the rule's own scalars for a parameter group at step ``t``, as unrounded doubles; of numbers or of
            symbols, see :mod:`signadam_ext.core.symbols`.
        uses_step: whether ``scalars`` depends on ``t``.
        reads_variance: whether it takes the variance of the gradient, from ``param.grad_variance``.
        follows_gradient: whether its step always goes against the gradient, so that it can be no more cautious.
        reads_param: whether its step depends on the parameter. Others read it only to move it.
        keeps_largest: whether the third moment is a largest value, which no rounding up may enter.
        starts_as_param: name of the moment that is a copy of the parameter at first, and weights ever after: it is
            kept in fp32 whatever ``state_dtype`` says.
        keeps_sums: whether groups keep sums over the steps that were taken, so that the host must know which were:
            those of an average, which evaluation puts in the parameter's place.
        moves_at_first: whether the first step moves and decays parameters. Otherwise it only makes state.
        threshold_pass: one of :data:`THRESHOLD_PASSES`.
        threshold_state: name of the state that keeps what the threshold is made of, unless ``threshold_pass`` is
            "NONE".
        update_scale: of what ``threshold_state`` makes a number that steps are multiplied by, in place of a threshold:
            "caution", of the share of entries whose step goes against the gradient; "rms", of the parameter's root mean
            square; "norm", of the corrected gradient, which the rule clips; or None.
        confidence: a function of the user's that gives the rule its gradient, or None.
    """

    name: str
    moments: tuple[str, ...]
    scalars: Callable[[Group, int], Scalars]
    bound: float | None = None
    unbounded: str = "this momentum has no bound"
    codes_bound: float | None = None
    uses_step: bool = False
    reads_variance: bool = False
    follows_gradient: bool = False
    reads_param: bool = False
    keeps_largest: bool = False
    starts_as_param: str | None = None
    keeps_sums: bool = False
    moves_at_first: bool = True
    threshold_pass: str = "NONE"
    threshold_state: str | None = None
    update_scale: str | None = None
    confidence: Callable[..., Any] | None = field(default=None, hash=False)  # one may have no hash

    def forms(self, group: Group) -> tuple[formats.Format, ...]:
        """How each moment is stored.

        Raises:
            ValueError: a ``state_dtype`` that this rule's moments do not allow.
        """
        dtypes = _named(group.get("state_dtype", "fp32"))
        if not isinstance(dtypes, tuple):
            dtypes = tuple("fp32" if name == self.starts_as_param else dtypes for name in self.moments)
        elif len(dtypes) != len(self.moments):
            raise ValueError(
                f"state_dtype={checks.shown(dtypes)}: must be one dtype, or {len(self.moments)}, one for each moment"
            )
        if self.keeps_largest and (few := [x for x in dtypes if x in formats.CODES]):
            raise ValueError(
                f"state_dtype={few[0]!r} with {self.moments[2]}: a largest value cannot be kept in few bits; "
                "use 'fp32' or 'bf16'"
            )
        if self.starts_as_param is not None:
            self._check_weights(dtypes)
        return tuple(
            self._form(dtype, self.first_forms if i == 0 else formats.SECOND) for i, dtype in enumerate(dtypes)
        )

    def _check_weights(self, dtypes: tuple[Any, ...]) -> None:
        for name, dtype in zip(self.moments, dtypes, strict=True):
            allowed = ("fp32",) if name == self.starts_as_param else ("fp32", "bf16")
            if dtype not in allowed:
                raise ValueError(
                    f"state_dtype={checks.shown(dtype)} of {name}: must be {' or '.join(map(repr, allowed))}; "
                    f"{self.starts_as_param} is a copy of the weights that every step moves by little"
                )

    @property
    def first_forms(self) -> Mapping[str, formats.Format]:
        """By ``state_dtype``, what the first moment of two or fewer may be stored as."""
        if self.starts_as_param is not None:
            return {"fp32": formats.FP32}
        return formats.UNBOUNDED if self.bound is None else formats.BOUNDED

    @functools.cached_property
    def _levels(self) -> Mapping[str, int]:
        """By ``state_dtype``, levels of the first moment's codes, of those that are codes."""
        if not self.moments or self.starts_as_param is not None:
            return {}
        return {dtype: form.levels for dtype, form in self.first_forms.items() if form.levels is not None}

    def _levels_of(self, state_dtype: Any) -> int | None:
        """The same of a ``state_dtype`` that has been checked, one or a sequence, and is no name."""
        if not self._levels:  # then nobody has looked at it
            return None
        dtypes = _named(state_dtype)
        return self._levels.get(dtypes[0] if isinstance(dtypes, tuple) else dtypes)

    def _form(self, dtype: object, allowed: Mapping[str, formats.Format]) -> formats.Format:
        if isinstance(dtype, str) and dtype in formats.BOUNDED and dtype not in allowed:
            raise ValueError(
                f"state_dtype={checks.shown(dtype)}: {self.unbounded}, so it needs a scale; use one of "
                f"{', '.join(map(repr, allowed))}"
            )
        return allowed[checks.one_of("state_dtype", dtype, formats.BOUNDED)]

    def scalar_set(self, group: Group, t: int, gradient_factor: float = 1.0) -> Scalars:
        """All scalars of a group at step ``t``: those every rule takes, and the rule's own.

        Gradients count ``gradient_factor`` times: what clipping, and a loss that was scaled, make of them.

        A moment with a bound B in codes is ``m * L / B`` to the rule, which then takes ``lr / (L / B)`` and
        ``(1 - beta1) * (L / B)``, and may not leave ``upper``, if it takes that.
        """
        own: Group = group
        if (factor := group.get("lr_factor")) is not None:
            own = ChainMap({"lr": number(group["lr"]) * factor}, group)  # type: ignore[arg-type]
        scalars = {
            "gradient_scale": -gradient_factor if group["maximize"] else gradient_factor,
            "lr": number(own["lr"]),
            **decay_scalars(group),
            **self.scalars(own, t),
        }
        if self.update_scale is not None:
            named = {"scales": self.update_scale != "norm", "clips": self.update_scale == "norm"}
            scalars.update({name: float(value) for name, value in named.items()})
            scalars["caution"] = float(self.update_scale == "caution")
        if not self.moves_at_first:
            moves = is_nonzero(t - 1)
            scalars["lr"] *= moves
            scalars["decay"] = moves * scalars["decay"] + (1 - moves)  # exact: one of them is 0
        dtypes = group.get("state_dtype", "fp32")
        levels = self._levels.get(dtypes) if type(dtypes) is str else self._levels_of(dtypes)
        if levels is not None:
            assert self.bound is not None
            unit = levels / self.bound
            scalars["lr"] /= unit
            scalars["one_minus_beta1"] *= unit
            if "upper" in scalars:
                # Rounding errors go beyond L by less, and storing cuts off twice as much.
                scalars["upper"] = levels + 2.0**-17
        return scalars


@dataclass(frozen=True)
class RuleChoice:
    """A rule that depends on hyperparameters; ``of(group)`` is the group's."""

    of: Callable[[Group], Rule]


def rule_by(hyperparameter: str, rules: Mapping[Any, Rule]) -> RuleChoice:
    """One rule for each value of a hyperparameter."""
    return RuleChoice(lambda group: checks.look_up(hyperparameter, group[hyperparameter], rules))


class HasRule(Protocol):
    """A class of optimizers, as far as it declares its rule."""

    RULE: ClassVar[Rule | RuleChoice]


def rule_of(optimizer: type[HasRule], group: Group) -> Rule:
    """The rule that updates a group.

    Raises:
        TypeError, ValueError: hyperparameters that name none.
    """
    rule = optimizer.RULE
    if isinstance(rule, RuleChoice):
        rule = rule.of(group)
    scale = scale_of(group)
    return rule if scale is None else _scaled(rule, scale)


@functools.cache
def _scaled(rule: Rule, scale: str) -> Rule:
    return replace(rule, **_SCALED[scale])


#: What each of these keeps of the last step, and MARS of its gradient's norm. What thresholds are made of is of many
#: steps, and stays where they are switched off and on again.
SCALE_STATES = ("agreement", "param_rms", "corrected_norm")
#: What scales a rule's steps, by the modifier that asks for it: caution in two passes, and one with the last step's
#: share; the root mean square of the parameter before the last step.
_SCALED: dict[str, dict[str, Any]] = {
    "exact": {"update_scale": "caution", "threshold_pass": "PASS_BEFORE", "threshold_state": "agreement"},
    "delayed": {"update_scale": "caution", "threshold_pass": "SAME_PASS", "threshold_state": "agreement"},
    "rms": {"update_scale": "rms", "threshold_pass": "SAME_PASS", "threshold_state": "param_rms"},
}


def method_of(optimizer: type[HasRule]) -> str:
    """The name of the class that declares the rule."""
    return next(base.__name__ for base in optimizer.__mro__ if "RULE" in vars(base))


def _named(state_dtype: Any) -> Any:
    """A ``state_dtype``, one or a tuple, with torch dtypes by their names."""
    if isinstance(state_dtype, (tuple, list)):
        return tuple(_named(each) for each in state_dtype)
    return formats.MOMENT_DTYPES.get(state_dtype, state_dtype) if isinstance(state_dtype, torch.dtype) else state_dtype


def decays(group: Group, count: int) -> Scalars:
    """Each of a group's ``count`` betas, and what is left of 1.

    Raises:
        ValueError: another number of betas.
    """
    betas = group["betas"]
    if len(betas) != count:
        raise ValueError(f"betas={checks.shown(betas)}: must unpack to {count}")
    scalars: Scalars = {}
    for (name, rest), beta in zip(_DECAYS, betas, strict=False):
        scalars[name], scalars[rest] = beta, 1 - beta
    return scalars
