"""What all optimizers of this package share: groups, state, plans, checkpoints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import backends, checks
from ._extension import load
from .dtypes import FORMATS
from .plan import Item, Plan
from .rule import Rule

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class SignOptimizer(Optimizer):
    """Base of the optimizers. A subclass names its rule and checks its own hyperparameters."""

    #: Names of a group's hyperparameters beside those all optimizers share.
    HYPERPARAMETERS: tuple[str, ...] = ("lr",)

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool | None = None,
    ) -> None:
        checks.unused_torch_option("foreach", foreach)
        checks.unused_torch_option("fused", fused, may_be_true=True)
        checks.unused_torch_option("differentiable", differentiable)
        self._plan: Plan | None = None
        self._plan_key: Any = None
        self._state_is_out = False
        self._check_group(defaults)
        super().__init__(params, defaults)

    @classmethod
    def _rule(cls, group: dict[str, Any]) -> Rule:
        """The rule that updates a group."""
        raise NotImplementedError

    @classmethod
    def _check_group(cls, group: dict[str, Any]) -> None:
        """Raises on hyperparameters that make no sense. Subclasses check their own and call this."""
        checks.learning_rate(group["lr"])
        checks.number("weight_decay", group["weight_decay"], 0.0)
        checks.flag("decoupled_weight_decay", group["decoupled_weight_decay"])
        checks.flag("maximize", group["maximize"])
        backends.check_name(group["backend"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; hyperparameters it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that cannot be served; the optimizer is unchanged.
        """
        if isinstance(param_group, dict):
            param_group = dict(param_group)
            self._fold_beta(param_group)
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _keep_first_of_each(group)
        try:
            for i, param in enumerate(group["params"]):
                # A frozen parameter, quantized perhaps, never gets a gradient and may be of any kind.
                if param.requires_grad:
                    checks.parameter(_label(group, len(self.param_groups) - 1, i), param)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._plan = None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step: every parameter with a gradient, in one launch per device and rule.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            TypeError, ValueError: a parameter or gradient that cannot be served, before anything is written.
            RuntimeError: a backend that cannot serve a parameter's device, before anything is written.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._fold_beta(group)
        key = [(self._rule(group), group["backend"]) for group in self.param_groups]
        plan = self._plan
        state = self._own_state if self._state_is_out else None
        if plan is None or key != self._plan_key or not plan.read(self.param_groups, state):
            plan = self._make_plan(key)
        plan.run()
        return loss

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """State of each parameter, as in torch.optim.

        Whoever has it may replace or move what is in it, so from the first access on every step looks whether someone
        did, which a training loop that never asks need not pay for.
        """
        self._state_is_out = True
        return self._own_state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.__dict__["state"] = value
        self._plan = None

    @property
    def _own_state(self) -> defaultdict[Tensor, Any]:
        # Under the name by which torch pickles and restores it.
        return self.__dict__["state"]

    @torch.no_grad()
    def _make_plan(self, key: Any) -> Plan:
        items = []
        for index, group in enumerate(self.param_groups):
            rule = self._rule(group)
            for i, param in enumerate(group["params"]):
                items.append(self._item(_label(group, index, i), param, index, rule, group["backend"]))
        plan = Plan(items, self.param_groups)
        if not plan.read(self.param_groups, None):
            raise RuntimeError(
                "gradients changed while the step was being planned; is another thread running backward?"
            )
        self._plan, self._plan_key = plan, key
        return plan

    def _item(self, label: str, param: Tensor, group: int, rule: Rule, backend: str) -> Item:
        return Item(
            label,
            param,
            group,
            rule,
            backend,
            takes_part=bool(self._own_state.get(param)) and param.dtype in FORMATS,
            check_state=lambda: _check_state(label, self._own_state.get(param, {}), rule, param),
            state=lambda: self._state_of(param, rule),
            watched_state=lambda: self._own_state[param],
        )

    def _state_of(self, param: Tensor, rule: Rule) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor]:
        """State of a parameter, made where it is missing: ``step``, the rule's moments, ``exp_avg_std``."""
        state = self._own_state[param]
        step = state.get("step", 0.0)
        if not isinstance(step, Tensor) or step.device.type != "cpu" or step.dtype != torch.float32 or step.dim() != 0:
            step = torch.tensor(float(step), dtype=torch.float32)
            state["step"] = step
        moments = []
        for name in rule.moments:
            if name not in state:
                state[name] = _zeros_like(param)
            like = torch.empty_like(param, device="meta")
            if not checks.same_strides(state[name], like.stride()):
                state[name] = torch.empty_strided(param.shape, like.stride(), device=param.device).copy_(state[name])
            moments.append(state[name])
        deviation = None
        if rule.statistics != "NONE":
            deviation = state.get("exp_avg_std")
            if deviation is None:
                deviation = torch.zeros((), dtype=torch.float64)
            deviation = state["exp_avg_std"] = deviation.to(param.device)
        return tuple(moments), deviation, step

    def _fold_beta(self, group: dict[str, Any]) -> None:
        """A group keeps its one ``beta`` as ``betas=(beta,)``, where schedulers that cycle momentum look for it."""
        if "beta" in group and len(self.defaults.get("betas", ())) == 1:
            group["betas"] = (group.pop("beta"),)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Holds plain tensors and numbers, loads into any backend and any parameter dtype."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group.pop("backend", None)
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but state keeps its own dtype, and ``backend`` stays this optimizer's.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer; nothing has been loaded
                then.
        """
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, incoming: dict[str, Any]) -> None:
            loaded.update(incoming)
            rules = []
            for saved, own in zip(incoming["param_groups"], self.param_groups, strict=False):
                # The learning rate is not checked: schedulers may leave a rounding error below zero.
                group = {**self.defaults, **saved, "lr": 0.0, "backend": own["backend"]}
                self._fold_beta(group)
                self._check_group(group)
                rules.append(self._rule(group))
            for index, label, param, state in _paired(self, incoming):
                _check_state(label, state, rules[index], param, on_any_device=True)

        def restore(_: Optimizer) -> None:
            # Optimizer.load_state_dict has cast state tensors to their parameter's dtype, shares the step counts, and
            # made generators of strings.
            for _index, _label, param, state in _paired(self, loaded):
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        device = "cpu" if name == "step" else param.device
                        self._own_state[param][name] = value.detach().to(device, copy=True)
                    elif isinstance(value, str):
                        self._own_state[param][name] = value
            for group, backend in zip(self.param_groups, kept, strict=True):
                group["backend"] = backend

        kept = [group["backend"] for group in self.param_groups]
        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may share its state with the original.
        self._state_is_out = self.__dict__.get("_state_is_out", True)
        super().__setstate__(state)
        self._plan = None
        self._plan_key = None
        for group in self.param_groups:
            self._fold_beta(group)
            for name, value in self.defaults.items():
                if name != "differentiable":  # which torch adds to the defaults, and to them alone
                    group.setdefault(name, value)


def _zeros_like(param: Tensor) -> Tensor:
    """A moment before the first step: fp32 zeros with the parameter's strides."""
    moment = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format, requires_grad=False)
    if moment.device.type == "cpu":
        load().advise_huge_pages(moment.data_ptr(), moment.nbytes)
    return moment.zero_()


def _label(group: dict[str, Any], group_index: int, index: int) -> str:
    """What errors call a parameter."""
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of group {group_index}"


def _check_state(label: str, state: dict[str, Any], rule: Rule, param: Tensor, *, on_any_device: bool = False) -> None:
    """Raises unless what there is of a parameter's state fits its rule. What else a user keeps there is left alone."""
    for name in rule.moments:
        if name in state:
            checks.moment(label, name, state[name], param, on_any_device=on_any_device)
    if rule.statistics != "NONE" and "exp_avg_std" in state:
        checks.deviation(label, state["exp_avg_std"])
    checks.step_count(label, state.get("step", 0))


def _keep_first_of_each(group: dict[str, Any]) -> None:
    """A parameter listed twice, which torch warns about, is updated once a step."""
    first: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(id(param), i)
    for name in ("params", "param_names"):
        if name in group:
            group[name] = [group[name][i] for i in first.values()]


def _paired(optimizer: Optimizer, state_dict: dict[str, Any]) -> Iterable[tuple[int, str, Tensor, dict[str, Any]]]:
    """(group, label, parameter, its saved state), as far as a state dict fits the optimizer's groups."""
    saved, own = state_dict["param_groups"], optimizer.param_groups
    for index, (old, new) in enumerate(zip(saved, own, strict=False)):
        for i, (number, param) in enumerate(zip(old["params"], new["params"], strict=False)):
            if number in state_dict["state"]:
                yield index, _label(new, index, i), param, state_dict["state"][number]
