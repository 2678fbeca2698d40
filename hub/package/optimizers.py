"""The optimizers: ``torch.optim.Optimizer``s whose step is one launch for each kind of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .core import checks, formats
from .core.memory_order import is_dense, order_of, restrided, same_strides
from .core.rule import Rule, RuleChoice, rule_by
from .methods import adam, lion, msgd, sign_adam, sign_adam_pp, sign_sgd, signum
from .table import Entry, Kind, Table, addresses

Params = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: What every optimizer takes.
COMMON: dict[str, Any] = {
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": False,
    "state_dtype": "fp32",
    "param_storage": "nearest",
    "seed": 0,
}


class _Optimizer(torch.optim.Optimizer):
    """What they share.

    Args:
        params: parameters, named parameters, or groups: fp32, bf16 or fp16, dense, on a GPU.
        hyperparameters: the method's own, and ``weight_decay``, ``decoupled_weight_decay``, ``maximize``;
            ``state_dtype``, how moments are stored: "fp32", "bf16", "int8", or, of momentum of signs, also "int4" and
            "int2"; ``param_storage``, what is kept of bf16 and fp16 parameters: "nearest", "stochastic", "split8",
            "split16" or "master"; ``seed`` of stochastic rounding.

    A step is not taken in part where a parameter is refused. State is loaded in the forms in which it was saved.
    """

    RULE: ClassVar[Rule | RuleChoice]
    #: The method's own hyperparameters with their defaults.
    OWN: ClassVar[dict[str, Any]]

    def __init__(self, params: Params, **hyperparameters: Any) -> None:
        defaults = {**COMMON, **self.OWN}
        for name in hyperparameters:
            if name not in defaults:
                raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        super().__init__(params, defaults | hyperparameters)
        self._tables: dict[Kind, Table] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of ``torch.optim.Optimizer``, with the group's storage forms and parameters checked."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._rule(group).forms(group)
            checks.one_of("param_storage", group["param_storage"], formats.PARAM_STORAGES)
            checks.seed("seed", group["seed"])
            for param in group["params"]:
                _check(param, group["param_storage"])
        except BaseException:
            self.param_groups.pop()
            raise

    def _rule(self, group: dict[str, Any]) -> Rule:
        return self.RULE.of(group) if isinstance(self.RULE, RuleChoice) else self.RULE

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step of every parameter with a gradient.

        Raises:
            TypeError, ValueError: a hyperparameter, parameter or gradient that cannot be served; nothing has been
                written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        kinds: dict[Kind, list[Entry]] = {}
        steps, first_id = [], 0
        for group in self.param_groups:
            rule, forms = self._rule(group), self._rule(group).forms(group)
            checks.learning_rate("lr", group["lr"])
            by_step: dict[int, dict[str, float]] = {}
            for param_id, param in enumerate(group["params"], first_id):
                if param.grad is None:
                    continue
                _check(param, group["param_storage"])
                storage = formats.effective_param_storage(group["param_storage"], param.dtype)
                state = self._state_of(param, rule, forms, storage)
                t = int(state["step"]) + 1
                if t not in by_step:
                    by_step[t] = rule.scalar_set(group, t)
                grad = param.grad if same_strides(param.grad, param.stride()) else restrided(param.grad, param)
                residual = state[formats.RESIDUALS[storage][0]] if storage in formats.RESIDUALS else None
                threshold_state = None if rule.threshold_state is None else state[rule.threshold_state]
                moments = tuple(state[name] for name in rule.moments)
                kind = Kind(rule, param.device, param.dtype, grad.dtype, forms, storage)
                kinds.setdefault(kind, []).append(
                    Entry(param, grad, moments, residual, threshold_state, by_step[t], group["seed"], param_id, t)
                )
                steps.append(state["step"])
            first_id += len(group["params"])
        for kind, entries in kinds.items():
            table = self._tables.get(kind)
            if table is None or table.addresses != addresses(entries):
                table = self._tables[kind] = Table(kind, entries)
            table.step(entries)
            # As any operation in place: autograd notices what was saved for a backward pass.
            torch.autograd.graph.increment_version([entry.param for entry in entries])
        torch._foreach_add_(steps, 1)
        return loss

    def _state_of(
        self, param: Tensor, rule: Rule, forms: tuple[formats.Format, ...], storage: str
    ) -> dict[str, Tensor]:
        """The parameter's state, made where it has none."""
        state = self.state[param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float64)
        for name, form in zip(rule.moments, forms, strict=True):
            if name not in state:
                state[name] = formats.allocate(form, param)
                if form.packed:  # codes lie in the memory order of the parameter
                    state[f"{name}_order"] = order_of(param.shape, param.stride())
            _check_moment(name, form, state, param)
        if storage in formats.RESIDUALS and formats.RESIDUALS[storage][0] not in state:
            state[formats.RESIDUALS[storage][0]] = formats.make_residual(storage, param)
        if rule.threshold_state is not None and rule.threshold_state not in state:
            state[rule.threshold_state] = torch.zeros((), dtype=torch.float64, device=param.device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of ``torch.optim.Optimizer``, but state keeps its dtypes."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    device = "cpu" if name == "step" else param.device
                    # Of moments in the parameter's shape also its strides; packed ones are flat.
                    like = value.shape == param.shape
                    self.state[param][name] = (restrided(value, param) if like else value.clone()).to(device)
        self._tables.clear()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}


def _check(param: Tensor, storage: str) -> None:
    """Raises where kernels cannot update this parameter."""
    if param.dtype not in formats.DTYPE_FORMATS:
        raise TypeError(f"a parameter is {param.dtype}: must be torch.float32, torch.bfloat16 or torch.float16")
    if storage.startswith("split") and param.dtype != torch.bfloat16:
        raise ValueError(f"param_storage={storage!r}: is for torch.bfloat16, and a parameter is {param.dtype}")
    if not is_dense(param):
        raise ValueError(f"a parameter of strides {param.stride()} has gaps: must fill a run of memory")
    grad = param.grad
    if grad is not None and (grad.is_sparse or grad.dtype not in formats.DTYPE_FORMATS):
        raise TypeError("a gradient is sparse, or of a dtype other than torch.float32, torch.bfloat16, torch.float16")
    if param.device.type == "cpu" and not _interpreted():
        raise ValueError("a parameter is on the CPU: kernels in Triton need a GPU, or TRITON_INTERPRET=1")


def _check_moment(name: str, form: formats.Format, state: dict[str, Any], param: Tensor) -> None:
    """Raises where a moment does not lie in memory as its parameter does, or is stored in another form."""
    moment = state[name]
    if form.packed:
        fits = moment.numel() == form.nbytes(param.numel())
        fits = fits and state.get(f"{name}_order") == order_of(param.shape, param.stride())
    else:
        fits = moment.shape == param.shape and same_strides(moment, param.stride())
    if not fits or moment.dtype != form.dtype or moment.device != param.device:
        raise ValueError(f"the state's {name} does not fit its parameter and state_dtype: has either been changed?")


def _interpreted() -> bool:
    from .triton_kernels.formats import INTERPRETED

    return bool(INTERPRETED.value)


class SignSGD(_Optimizer):
    """Sign of the gradient, beyond a threshold ``alpha``."""

    RULE = sign_sgd.RULE
    OWN: ClassVar[dict[str, Any]] = {"lr": 1e-3, "alpha": 0.0}


class Signum(_Optimizer):
    """Sign of the momentum; ``betas`` is one number in a tuple."""

    RULE = signum.RULE
    OWN: ClassVar[dict[str, Any]] = {"lr": 1e-3, "betas": (0.9,)}


class SignAdam(_Optimizer):
    """signADAM; ``second_moment`` is "exact", or "analytic", which keeps none."""

    RULE = rule_by("second_moment", sign_adam.RULES)
    OWN: ClassVar[dict[str, Any]] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "second_moment": "exact"}


class SignAdamPP(_Optimizer):
    """signADAM++; ``confidence`` is "fixed", "adaptive", "adaptive_delayed" or "sparsity"."""

    RULE = rule_by("confidence", sign_adam_pp.RULES)
    OWN: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9,),
        "confidence": "fixed",
        "alpha": None,
        "confidence_beta": 0.9,
        "target": None,
        "gain": 1.0,
    }


class Lion(_Optimizer):
    """Sign of a blend of momentum and gradient."""

    RULE = lion.RULE
    OWN: ClassVar[dict[str, Any]] = {"lr": 1e-4, "betas": (0.9, 0.99)}


class MSGD(_Optimizer):
    """SGD with momentum, kept as an average."""

    RULE = msgd.RULE
    OWN: ClassVar[dict[str, Any]] = {"lr": 1e-2, "betas": (0.9,)}


class Adam(_Optimizer):
    """Adam, whose weight decay is added to the gradient."""

    RULE = rule_by("amsgrad", adam.RULES)
    OWN: ClassVar[dict[str, Any]] = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "amsgrad": False,
        "decoupled_weight_decay": False,
    }


class AdamW(_Optimizer):
    """Adam with decoupled weight decay."""

    RULE = rule_by("amsgrad", adam.RULES)
    OWN: ClassVar[dict[str, Any]] = {**Adam.OWN, "weight_decay": 1e-2, "decoupled_weight_decay": True}
