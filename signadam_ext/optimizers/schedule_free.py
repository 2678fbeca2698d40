"""Schedule-Free: an average of the iterates in place of a schedule of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..backends.reference.rules import as_fp32
from ..core import checks, formats, shards, symbols, tensors
from ..core.dynamo import untraced
from ..core.hyperparameters import BETA, FLAG, LEARNING_RATE, ONE_BETA, TWO_BETAS, Checks, Number, of_group
from ..core.options import COMMON, OtherOptions, StateDtype
from ..core.rule import Group, Rule, Scalars
from ..core.symbols import number, power, square_root
from ..state.checkpoint import TRAINED, Layout
from ..state.schema import Fitted, fit
from .base import Params, SignOptimizer
from .groups import label, layout_of
from .step_lists import step_lists

#: Where a step's weight, and so the sum of weights, ends. Their quotient is all that matters.
LARGEST_WEIGHT = 2.0**900


def _averaging(group: Group) -> Scalars:
    """What both rules take: the weight of z in x, and how far the point of gradients goes with a step."""
    # The first step makes z the average.
    weight = number(group["averaging"]) if "averaging" in group else 1.0
    return {
        "averaging": weight,
        "one_minus_beta1": 1 - number(group["betas"][0]) * (1 - weight),
        "decay": 1.0,  # which the rule does
    }


def _adamw_scalars(group: Group, t: int) -> Scalars:
    beta2 = number(group["betas"][1])
    correction = square_root(1 - power(beta2, t))
    return {
        **_averaging(group),
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "lr": number(group["lr"]) * correction,
        "eps": number(group["eps"]) * correction,
    }


ADAMW_RULE = Rule(
    "schedule_free_adamw",
    moments=("z", "exp_avg_sq"),
    scalars=_adamw_scalars,
    uses_step=True,
    reads_param=True,
    starts_as_param="z",
    keeps_sums=True,
)
SIGN_RULE = Rule(
    "schedule_free_sign",
    moments=("z",),
    scalars=lambda group, t: {**_averaging(group), "alpha": number(group["alpha"])},
    reads_param=True,
    starts_as_param="z",
    keeps_sums=True,
)


def _count(name: str, value: Any) -> int:
    """A whole number of at least 0."""
    found = checks.number(name, value, 0.0)
    if found != int(found):
        raise ValueError(f"{name}={checks.shown(value)}: must be a whole number")
    return int(found)


#: What a group says of the average, and what it keeps of it.
AVERAGE: Checks = {
    "warmup_steps": _count,
    "r": Number(),
    "weight_lr_power": Number(),
    "k": _count,
    "weight_sum": Number(),
    "lr_max": Number(),
    "beta_of_y": BETA,
    "train_mode": FLAG,
}
BEGINNING = {"k": 0, "weight_sum": 0.0, "lr_max": 0.0, "beta_of_y": 0.0, "train_mode": True}


def _weight(base: float, exponent: float) -> float:
    """``base ** exponent``, at most :data:`LARGEST_WEIGHT`. Whole exponents give the same bits on every platform."""
    try:
        found = symbols.power(base, int(exponent)) if exponent == int(exponent) else base**exponent
    except OverflowError:
        found = math.inf
    return float(min(found, LARGEST_WEIGHT))


def _first_beta(group: Group) -> float:
    """The weight of x in y, which says what x is.

    Raises:
        ValueError: another than y was made with.
    """
    beta = float(group["betas"][0] if "betas" in group else group["beta"])
    before = group.get("beta_of_y", 0.0)  # which lists of tensors have none of
    if before not in (0.0, beta):  # 0 before the first step, and in checkpoints that do not say it
        raise ValueError(
            f"the first beta is {beta!r}, and was {before!r} in the steps before: must stay so, since "
            "it alone tells the average of the points y at which gradients are taken; give schedulers that cycle it "
            "cycle_momentum=False"
        )
    return beta


class ScheduleFree(SignOptimizer):
    """What both classes share: the sums of a group, and the two modes."""

    KEPT = frozenset(BEGINNING)

    @classmethod
    def check_relations(cls, group: Group) -> None:
        super().check_relations(group)
        beta = group["betas"][0]
        if not beta > 0:
            raise ValueError(
                f"the first beta is {beta!r}: must be above 0, since of the points y at which gradients are taken "
                "nothing else would tell their average"
            )
        _first_beta(group)

    def _ask(self, options: dict[str, bool]) -> None:
        if options.get("capturable"):
            raise ValueError(
                f"capturable=True with {type(self).__name__}: its groups keep sums over the steps taken, which the "
                "host must count"
            )
        super()._ask(options)

    def of_this_step(self, group: dict[str, Any]) -> dict[str, Any]:
        if not group["train_mode"]:
            raise RuntimeError(
                "step() in evaluation, where parameters are averages: call optimizer.train() before the gradients are "
                "taken"
            )
        beta = _first_beta(group)
        k, lr = group["k"], float(group["lr"])
        if k < group["warmup_steps"]:
            lr *= (k + 1) / group["warmup_steps"]
        largest = max(lr, group["lr_max"])
        weight = min(_weight(k + 1.0, group["r"]) * _weight(largest, group["weight_lr_power"]), LARGEST_WEIGHT)
        total = group["weight_sum"] + weight
        return {
            **group,
            "lr": lr,
            "averaging": weight / total if total > 0 else 0.0,
            "after_step": {"k": k + 1, "weight_sum": total, "lr_max": largest, "beta_of_y": beta},
        }

    @untraced
    def eval(self) -> None:
        """Puts the averages x in the place of the parameters. Where they are already, nothing happens.

        Raises:
            TypeError, ValueError: a state that cannot be the parameter's, or a first beta that is not that of the steps
                before; nothing has been changed then.
            RuntimeError: a step on another thread runs.
        """
        self._between_steps(self._put_averages)

    @untraced
    def train(self) -> None:
        """Brings the parameters back, with the bits that they had before :meth:`eval`. Changes since then are lost.

        Raises:
            TypeError, ValueError: a state entry ``y`` that cannot be the parameter's, or is missing, as it is
                where torch's distributed checkpoint of evaluation was loaded into one in training; nothing has been
                changed then.
            RuntimeError: a step on another thread runs.
        """
        self._between_steps(self._put_back)

    def _between_steps(self, change: Callable[[], None]) -> None:
        enabled = torch.is_grad_enabled()
        try:
            with torch.no_grad(), self.runtime.between_steps():
                change()
        finally:
            # As in a step: a signal handler may raise as torch.no_grad is left.
            torch._C._set_grad_enabled(enabled)

    def _put_averages(self) -> None:
        # Parameters may share memory: all are read before one is written.
        found: list[tuple[Layout, dict[str, Any], Tensor, Fitted, float]] = []
        groups = [(index, group) for index, group in enumerate(self.param_groups) if group["train_mode"]]
        for index, group in groups:
            with of_group(index):
                beta = _first_beta(group)
            for i, param in enumerate(group["params"]):
                state = self.state.get(param)
                if state and "z" in state:
                    layout = layout_of(self, label(group, index, i), param, group)
                    # As the next step would find it, and without random bits: no moment is in codes.
                    fitted = fit(layout, state, group["seed"], 0)
                    found.append((layout, state, layout.param.detach().clone(), fitted, beta))
        try:
            for layout, state, y, fitted, beta in found:
                state[TRAINED] = y
                layout.param.copy_(_average(layout.param_storage, y, fitted, beta))
            for _, group in groups:
                group["train_mode"] = False
        except BaseException:
            for layout, state, y, _, _ in found:
                layout.param.copy_(y)
                state.pop(TRAINED, None)
            for _, group in groups:
                group["train_mode"] = True
            raise

    def _put_back(self) -> None:
        kept: list[tuple[Tensor, dict[str, Any]]] = []
        groups = [(index, group) for index, group in enumerate(self.param_groups) if not group["train_mode"]]
        for index, group in groups:
            for i, param in enumerate(group["params"]):
                state = self.state.get(param)
                if not state or "z" not in state:
                    continue  # it has taken no step
                local, name = shards.local(param), label(group, index, i)
                if TRAINED not in state:
                    raise ValueError(
                        f"state {TRAINED!r} of {name} is missing, what it had before eval(): the parameter stays the "
                        "average. A distributed checkpoint that was saved in evaluation must be loaded into an "
                        "optimizer that is in evaluation itself: call get_state_dict() once, and then eval()"
                    )
                dtypes = tuple(formats.DTYPE_FORMATS)
                tensors.state_tensor(f"state {TRAINED!r} of {name}", state[TRAINED], local.shape, dtypes)
                kept.append((local, state))
        trained = [group for _, group in groups]
        try:
            _restore(kept, trained)
        except BaseException:
            # The averages are not kept: what a signal handler has interrupted is brought to its end.
            _restore(kept, trained)
            raise


def _restore(kept: list[tuple[Tensor, dict[str, Any]]], groups: list[dict[str, Any]]) -> None:
    """Puts each parameter's own elements back where that has not been done yet."""
    for param, state in kept:
        if TRAINED in state:
            param.copy_(state[TRAINED])
    for group in groups:
        group["train_mode"] = True
    for _, state in kept:
        state.pop(TRAINED, None)


def _average(param_storage: str, y: Tensor, fitted: Fitted, beta: float) -> Tensor:
    """x, of which y is the blend ``beta * x + (1 - beta) * z``."""
    y = formats.load_param(param_storage, y, fitted.residual)
    return y + as_fp32(1 - 1 / beta, y.device) * (fitted.moments[0] - y)


class ScheduleFreeAdamW(ScheduleFree):
    r"""AdamW without a schedule: gradients are taken between the iterates and their average, which is what is kept.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0. A float or a CPU tensor of one element. Default: 0.0025.
        betas: weight of the average in the point of gradients, in (0, 1), and decay of the second moment, in [0, 1).
            Default: (0.9, 0.999).
        eps: added to the root of the second moment, at least 0. Default: 1e-8.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether ``weight_decay * p`` is part of the step, p being the point of gradients, or is
            added to the gradient. Default: True.
        warmup_steps: over how many steps the learning rate rises to ``lr``, from ``lr / warmup_steps``. Default: 0.
        r: a step weighs ``t**r`` in the average, at least 0. Default: 0.
        weight_lr_power: and the largest learning rate so far to this power, at least 0, so that warm-up weighs less.
            Default: 2.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        state_dtype: how the second moment is stored between steps: "fp32" or "bf16". ``torch.bfloat16`` is the same as
            "bf16"; of a tuple, which begins with "fp32" for z, the second says it. z is kept in fp32 whatever the
            parameter's dtype: it is weights, which move by little, and no average of anything. Default: "fp32".
        param_storage: what is kept of a bf16 or fp16 parameter beyond its dtype: nothing, rounding to nearest
            ("nearest"), so that steps below half its last place are lost, or at random ("stochastic"); low bits
            ("split8", "split16", not of fp16); an fp32 copy ("master"). An fp32 parameter is its own master under
            each of them. Default: "nearest".
        seed: of stochastic rounding, in [0, 2^64); the same seed gives the same bits on every backend. Default: 0.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors, and triton
            first where steps are scaled by a number of the tensor's (caution, "rms"). Default: "auto".
        weight_decay_kind: "decoupled" or "coupled", as ``decoupled_weight_decay`` says; "cautious" is refused, since
            the step depends on the parameter. Default: None, what ``decoupled_weight_decay`` says.
        weight_decay_scale: what decoupled decay shrinks by: "lr", ``lr * weight_decay``; "corrected", ``lr**2 /
            largest_lr * weight_decay``; "independent", ``weight_decay``; "fully_decoupled", ``lr / base_lr *
            weight_decay``. Default: "lr".
        lr_scale: a factor of each parameter's learning rate, which decay does not see: "shape", ``2 / (rows +
            columns)`` of a matrix; or a function of its name (or None) and shape. A number in a group is left to
            schedulers that multiply with it. Default: 1.0.
        caution: refused, as "cautious" is. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it. differentiable and capturable may
            not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = ScheduleFreeAdamW(model.parameters(), warmup_steps=10)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are the averages now
        >>> optimizer.train()

    Schedule-Free AdamW [SF, Alg. 1], as in the authors' code:

    .. math::
        y_t &= (1 - \beta_1)\, z_t + \beta_1 x_t, \qquad g_t \text{ taken at } y_t \\
        v_t &= \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \qquad
        d_t = \frac{g_t}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} + \lambda y_t \\
        z_{t+1} &= z_t - \gamma_t d_t, \qquad x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}

    Gamma is the learning rate with its warm-up, lambda is ``weight_decay``, and :math:`c_t` is the weight
    :math:`t^r (\max_{s \le t} \gamma_s)^{\mathrm{weight\_lr\_power}}` over the sum of all weights up to it. x is not
    kept: with the step :math:`s = \gamma_t d_t`, y becomes :math:`y + (c (z - y) - (1 - \beta_1 (1 - c)) s)` and z
    becomes :math:`z - s`, in this order, one rounding each. torch's ``lerp``, of which the authors' code is made,
    takes another formula from a weight of a half on.

    The parameters are y while the model is trained. :meth:`eval` puts x in their place, for evaluation and for the
    weights that are kept in the end, and :meth:`train` brings y back, bit for bit: it has been kept, in the state entry
    ``y``, in the parameter's dtype. A step in between is an error. The optimizer begins in training, where x, y and z
    are the same. Checkpoints hold the mode, and so resume in either; a model's own, taken in evaluation, holds x. The
    authors' code keeps no copy and turns one into the other by interpolation, which is exact but for rounding, and
    drifts in bf16. A model with batch norms needs its statistics at x: run some batches through it after ``eval()``,
    with the model in training mode.

    A group holds ``k``, the steps taken, ``weight_sum``, ``lr_max``, and ``beta_of_y``, their first beta. A step
    that is skipped for its norm or by a GradScaler changes none of them. Another ``betas[0]`` would make another
    average of the same y and z, so that a step and :meth:`eval` refuse it: OneCycleLR and CyclicLR take
    ``cycle_momentum=False``. The host must know which steps are taken: ``capturable`` is refused, and with
    ``max_grad_norm`` on a GPU a step waits for the norm. Refused, too, are ``release_gradients``, ``offload`` and
    :class:`signadam_ext.functional.FunctionalOptimizer`, which have no groups that last.

    State: ``z``, ``exp_avg_sq`` (v), ``step``, and in evaluation ``y``. z begins as the parameter.

    Source: [SF] Defazio et al., arXiv 2405.15682, Alg. 1; facebookresearch/schedule_free.
    """

    RULE = ADAMW_RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": TWO_BETAS, "eps": Number(), **AVERAGE}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 0.0025,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        state_dtype: StateDtype = "fp32",
        param_storage: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        **others: Unpack[OtherOptions],
    ) -> None:
        given = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            **BEGINNING,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "state_dtype": state_dtype,
            "param_storage": param_storage,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, given, others)


class ScheduleFreeSign(ScheduleFree):
    r"""Sign descent without a schedule: the iterates move by signs, and their average is what is kept.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, of any shape.
        lr: learning rate, at least 0; an entry of z moves by this much, or not at all where the sign is 0. A float or a
            CPU tensor of one element. Default: 1e-3.
        beta: weight of the average in the point of gradients, in (0, 1). Default: 0.9.
        alpha: threshold of the gate, at least 0, absolute, in units of the gradient. Default: 0.
        weight_decay: at least 0. Default: 0.
        decoupled_weight_decay: whether ``weight_decay * p`` is part of the step, p being the point of gradients, or is
            added to the gradient. Default: True.
        warmup_steps: over how many steps the learning rate rises to ``lr``, from ``lr / warmup_steps``. Default: 0.
        r: a step weighs ``t**r`` in the average, at least 0. Default: 0.
        weight_lr_power: and the largest learning rate so far to this power, at least 0, so that warm-up weighs less.
            Default: 2.
        maximize: ascend instead of descend. Default: False.
        max_grad_norm: largest norm of all groups' gradients together. A longer gradient counts as if it were scaled to
            this norm, and a step whose norm is not finite is skipped; see ``last_grad_norm`` and ``skipped_steps``. The
            same in all groups; infinite: only the latter. Default: None, nobody looks at the norm.
        param_storage: what is kept of a bf16 or fp16 parameter beyond its dtype: nothing, rounding to nearest
            ("nearest"), so that steps below half its last place are lost, or at random ("stochastic"); low bits
            ("split8", "split16", not of fp16); an fp32 copy ("master"). An fp32 parameter is its own master under
            each of them. Default: "nearest".
        seed: of stochastic rounding, in [0, 2^64); the same seed gives the same bits on every backend. Default: 0.
        backend: "cpu", "cuda", "triton" or "reference"; "auto" takes cuda, then triton, for CUDA tensors, and triton
            first where steps are scaled by a number of the tensor's (caution, "rms"). Default: "auto".
        weight_decay_kind: "decoupled" or "coupled", as ``decoupled_weight_decay`` says; "cautious" is refused, since
            the step depends on the parameter. Default: None, what ``decoupled_weight_decay`` says.
        weight_decay_scale: what decoupled decay shrinks by: "lr", ``lr * weight_decay``; "corrected", ``lr**2 /
            largest_lr * weight_decay``; "independent", ``weight_decay``; "fully_decoupled", ``lr / base_lr *
            weight_decay``. Default: "lr".
        lr_scale: a factor of each parameter's learning rate, which decay does not see: "shape", ``2 / (rows +
            columns)`` of a matrix; or a function of its name (or None) and shape. A number in a group is left to
            schedulers that multiply with it. Default: 1.0.
        caution: refused, as "cautious" is. Default: None.
        foreach, fused, differentiable, capturable: for code written for torch.optim. The update is always fused; True
            for fused also takes the scale of a GradScaler in the step, and skips it. differentiable and capturable may
            not be True.

    Raises:
        TypeError, ValueError: a hyperparameter outside its range, or a parameter of another dtype or layout.
        RuntimeError: a backend that this installation cannot use.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = ScheduleFreeSign(model.parameters(), lr=1e-3)
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.eval()  # the parameters are the averages now
        >>> optimizer.train()

    Schedule-Free [SF] with :class:`SignSGD`'s step, the gated sign, for the direction of :class:`ScheduleFreeAdamW`:

    .. math::
        y_t &= (1 - \beta)\, z_t + \beta x_t, \qquad g_t \text{ taken at } y_t \\
        z_{t+1} &= z_t - \gamma_t (c(g_t) + \lambda y_t), \qquad x_{t+1} = (1 - c_t)\, x_t + c_t z_{t+1}

    What the average weighs, and how it is computed, is said there. There is no second moment. No paper has this rule.

    The parameters are y while the model is trained. :meth:`eval` puts x in their place, for evaluation and for the
    weights that are kept in the end, and :meth:`train` brings y back, bit for bit: it has been kept, in the state entry
    ``y``, in the parameter's dtype. A step in between is an error. The optimizer begins in training, where x, y and z
    are the same. Checkpoints hold the mode, and so resume in either; a model's own, taken in evaluation, holds x. The
    authors' code keeps no copy and turns one into the other by interpolation, which is exact but for rounding, and
    drifts in bf16. A model with batch norms needs its statistics at x: run some batches through it after ``eval()``,
    with the model in training mode.

    A group holds ``k``, the steps taken, ``weight_sum``, ``lr_max``, and ``beta_of_y``, their first beta. A step
    that is skipped for its norm or by a GradScaler changes none of them. Another ``beta`` would make another
    average of the same y and z, so that a step and :meth:`eval` refuse it: OneCycleLR and CyclicLR take
    ``cycle_momentum=False``. The host must know which steps are taken: ``capturable`` is refused, and with
    ``max_grad_norm`` on a GPU a step waits for the norm. Refused, too, are ``release_gradients``, ``offload`` and
    :class:`signadam_ext.functional.FunctionalOptimizer`, which have no groups that last.

    State: ``z``, in fp32, ``step``, and in evaluation ``y``. z begins as the parameter.

    Sources: [SF] Defazio et al., arXiv 2405.15682, Alg. 1; the direction of [BW] Bernstein et al., arXiv 1802.04434.
    """

    RULE = SIGN_RULE
    HYPERPARAMETERS: ClassVar[Checks] = {"lr": LEARNING_RATE, "betas": ONE_BETA, "alpha": Number(), **AVERAGE}
    COMMON: ClassVar[frozenset[str]] = COMMON - {"state_dtype"}

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        *,
        beta: float = 0.9,
        alpha: float | Tensor = 0.0,
        weight_decay: float | Tensor = 0.0,
        decoupled_weight_decay: bool = True,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        maximize: bool = False,
        max_grad_norm: float | None = None,
        param_storage: str = "nearest",
        seed: int = 0,
        backend: str = "auto",
        **others: Unpack[OtherOptions],
    ) -> None:
        given = {
            "lr": lr,
            "betas": (beta,),
            "alpha": alpha,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            **BEGINNING,
            "maximize": maximize,
            "max_grad_norm": max_grad_norm,
            "param_storage": param_storage,
            "seed": seed,
            "backend": backend,
        }
        super().__init__(params, given, others)


# Of lists nobody keeps sums: the weight of the step is given.
AVERAGING = Number(0.0, 1.0, open_high=False)


class _AdamWOfLists(ScheduleFreeAdamW):
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": TWO_BETAS,
        "eps": Number(),
        "averaging": AVERAGING,
    }


class _SignOfLists(ScheduleFreeSign):
    HYPERPARAMETERS: ClassVar[Checks] = {
        "lr": LEARNING_RATE,
        "betas": ONE_BETA,
        "alpha": Number(),
        "averaging": AVERAGING,
    }


def schedule_free_adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    zs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    averaging: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`ScheduleFreeAdamW`, in place on ``params`` and the state lists.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        zs: fp32, of the parameters' shapes and strides; copies of the parameters at first.
        exp_avg_sqs: the same; zeros at first.
        state_steps: 0-dim fp32 on the CPU, steps taken so far, counted up.
        lr: the step's learning rate, its warm-up included.
        averaging: the step's weight over the sum of all up to it, in [0, 1]; 1 at first, ``1 / t`` of equal weights.
        betas, eps: as in :class:`ScheduleFreeAdamW`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> zs, exp_avg_sqs = [torch.zeros(3)], [torch.zeros(3)]
        >>> state_steps = [torch.tensor(0.0)]
        >>> schedule_free_adamw(params, grads, zs, exp_avg_sqs, state_steps, lr=0.5, averaging=1.0)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        _AdamWOfLists,
        params,
        grads,
        {"z": zs, "exp_avg_sq": exp_avg_sqs},
        state_steps=state_steps,
        lr=lr,
        averaging=averaging,
        betas=betas,
        eps=eps,
        **hyperparameters,
    )


def schedule_free_sign(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    zs: Sequence[Tensor],
    *,
    lr: float | Tensor,
    averaging: float,
    beta: float = 0.9,
    alpha: float = 0.0,
    **hyperparameters: Any,
) -> None:
    """One step of :class:`ScheduleFreeSign`, in place on ``params`` and the state list.

    Args:
        params, grads: of equal length; a parameter whose gradient is None is left alone.
        zs: fp32, of the parameters' shapes and strides; copies of the parameters at first.
        lr: the step's learning rate, its warm-up included.
        averaging: the step's weight over the sum of all up to it, in [0, 1]; 1 at first, ``1 / t`` of equal weights.
        beta, alpha: as in :class:`ScheduleFreeSign`.
        hyperparameters: ``weight_decay``, ``decoupled_weight_decay``, ``maximize``, ``backend``, as there.

    Example:
        >>> params, grads = [torch.zeros(3)], [torch.tensor([1.0, -2.0, 0.0])]
        >>> zs = [torch.zeros(3)]
        >>> schedule_free_sign(params, grads, zs, lr=0.5, averaging=1.0)
        >>> params
        [tensor([-0.5000,  0.5000,  0.0000])]
    """
    step_lists(
        _SignOfLists,
        params,
        grads,
        {"z": zs},
        lr=lr,
        averaging=averaging,
        beta=beta,
        alpha=alpha,
        **hyperparameters,
    )
