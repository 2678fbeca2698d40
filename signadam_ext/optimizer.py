"""What all optimizers of this package share: groups, state, plans, checkpoints."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import checks, hyperparameters, options
from ._extension import load
from .checkpoint import (
    Layout,
    adopt,
    check,
    export,
    export_entry,
    kind_key,
    read_entries,
    read_head,
    said_beside,
    write_entries,
    write_head,
    writer,
)
from .dtypes import FORMATS
from .observed import Statistics, collect
from .plan import Item, Plan, State
from .rule import Group, Rule
from .storage import BESIDE, allocate, effective_weights, make_beside, restrided

if TYPE_CHECKING:
    from .release import GradientRelease

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Group entries that stay the constructor's when a checkpoint is loaded.
CONSTRUCTORS = ("backend", "state_dtype", "weights")

#: Largest beta, by levels of a momentum's codes, that goes without a warning of the variance that rounding adds.
VARIANCE_LIMIT = {127: 0.99, 7: 0.95, 1: 0.9}


class SignOptimizer(Optimizer):
    """Base of the optimizers. A subclass names its rule and says what its own hyperparameters may be."""

    #: A group's hyperparameters beside those all optimizers share, each with what checks it.
    HYPERPARAMETERS: ClassVar[hyperparameters.Checks] = {"lr": hyperparameters.LEARNING_RATE}

    #: Where each parameter is: its group's index, and its own in the group.
    _places: dict[int, tuple[int, int]]

    #: Set while gradients are released. A copy or a pickle does not take it along.
    _released: GradientRelease | None = None

    #: Defaults of what it shares with the others, see :class:`options.Common`.
    COMMON: ClassVar[dict[str, Any]] = options.DEFAULTS
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fills the docstring's placeholders, and spells out ``**common`` in the signature."""
        super().__init_subclass__(**kwargs)
        if cls.__doc__ is not None:
            cls.__doc__ = options.documented(cls.__doc__)
        cls.__signature__ = options.signature(cls.__init__, cls.COMMON)

    def __init__(self, params: Params, own: dict[str, Any], common: Mapping[str, Any]) -> None:
        hyperparameters.check_beta_names(type(self), common)
        defaults = hyperparameters.kept({**own, **options.completed(type(self).__name__, self.COMMON, common)})
        for name in checks.TORCH_OPTIONS:
            checks.torch_option(name, defaults.pop(name))
        self._forget_plans()
        self._observes = False
        self._round = 0
        self._state_is_out = False
        self._has_warned = False
        defaults["seed"] = self._check_group(defaults)["seed"]  # schedulers change numbers, but no seed
        super().__init__(params, defaults)

    @classmethod
    def _rule(cls, group: Group) -> Rule:
        """The rule that updates a group."""
        raise NotImplementedError

    @classmethod
    def _check_group(cls, group: Mapping[str, Any]) -> dict[str, Any]:
        """The group with Python numbers; raises on hyperparameters that make no sense."""
        return hyperparameters.checked(cls, group)

    @classmethod
    def _check_relations(cls, group: Group) -> None:
        """Raises on hyperparameters that make no sense together. Each by itself has been checked."""
        cls._rule(group).forms(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; hyperparameters it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that cannot be served; the optimizer is unchanged.
        """
        if isinstance(param_group, dict):
            param_group = hyperparameters.kept(param_group)
            with hyperparameters.of_group(len(self.param_groups)):
                for name in checks.TORCH_OPTIONS:
                    checks.torch_option(name, param_group.get(name))
                hyperparameters.check_beta_names(type(self), param_group, folded=True)
                self._fold_beta(param_group)
                checked = self._check_group({**self.defaults, **param_group})
                param_group["seed"] = checked["seed"]
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _keep_first_of_each(group)
        try:
            for i, param in enumerate(group["params"]):
                # A frozen parameter, quantized perhaps, never gets a gradient and may be of any kind.
                if param.requires_grad:
                    label = _label(group, len(self.param_groups) - 1, i)
                    checks.parameter(label, param)
                    checks.weights(label, group["weights"], param.dtype)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._warn_of_variance(group)
        self._forget_plans()
        if self._released is not None:
            self._released.extend(group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step: every parameter with a gradient, in one launch per device and rule.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            TypeError, ValueError: a parameter, a gradient or a hyperparameter that cannot be served, before anything is
                written.
            RuntimeError: a backend that cannot serve a parameter's device, before anything is written.
        """
        if self._released is not None:
            return self._released.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    def _step_all(self) -> None:
        """The step of every parameter with a gradient."""
        groups = self._read_groups()
        key = [self._plan_key_of(group) for group in groups]
        plan = self._plan
        state = self._own_state if self._state_is_out else None
        if plan is None or key != self._plan_key or not plan.read(groups, state):
            plan = self._make_plan(key)
        plan.run()
        self._round += 1
        plan.round = self._round

    @torch.no_grad()
    def _step_parameter(self, param: Tensor) -> bool:
        """The step of one parameter, as if no other had a gradient; False where no group has it."""
        place = self._places.get(id(param))
        if place is None or not self._is_at(param, *place):
            self._find_places()
            place = self._places.get(id(param))
            if place is None:
                return False
        index, i = place
        group = self._read_group(index)
        number = i + sum(len(group["params"]) for group in self.param_groups[:index])
        key = (self._plan_key_of(group), number)
        # To its plan the parameter is the only one of the only group, so that reading takes no look at the others.
        alone = [{**group, "params": [param]}]
        state = None
        if self._state_is_out:
            state = {param: self._own_state[param]} if param in self._own_state else {}
        plan, plan_key = self._plans_alone.get(id(param), (None, None))
        if plan is None or key != plan_key or not plan.read(alone, state):
            item = self._item(_label(group, index, i), param, group, 0, number)
            with torch.inference_mode(False), torch.no_grad():
                plan = Plan([item], alone, observes=self._observes)
            if not plan.read(alone, None):
                raise RuntimeError(
                    "a gradient changed while the step was being planned; is another thread running backward?"
                )
            self._plans_alone[id(param)] = plan, key
        plan.run()
        plan.round = self._round
        return True

    def _read_group(self, index: int) -> dict[str, Any]:
        """A group with the hyperparameters that hold for this step, checked, as Python numbers."""
        return self._hyperparameters.read(index, self.param_groups[index], self.defaults)

    def _read_groups(self) -> list[dict[str, Any]]:
        return [self._read_group(index) for index in range(len(self.param_groups))]

    def observe(self, enabled: bool = True) -> None:
        """Has every step from now on gather what :meth:`statistics` tells, in the pass that updates; or no longer.

        It takes time (on the CPU about as long again as the step) and 48 bytes for each 16384 entries. Nothing of it
        enters a checkpoint, and a copy of the optimizer does not observe.
        """
        checks.flag("enabled", enabled)
        if enabled != self._observes:
            self._observes = enabled
            self._forget_plans()

    def statistics(self) -> Statistics:
        """What the last step did, tensor by tensor and in all. Nothing waits for the device before this is called.

        Raises:
            RuntimeError: nothing has been observed: :meth:`observe` was not called, or no step has been taken since.
        """
        if not self._observes:
            raise RuntimeError("nothing is observed: call optimizer.observe() before the steps you want to look at")
        known = (self._plan, *(plan for plan, _ in self._plans_alone.values()))
        plans = [plan for plan in known if plan is not None and plan.round == self._round > 0]
        if not plans:
            raise RuntimeError("no step has been taken since optimizer.observe(), so there is nothing to tell")
        return collect(plans)

    def _is_at(self, param: Tensor, index: int, i: int) -> bool:
        params = self.param_groups[index]["params"] if index < len(self.param_groups) else []
        return i < len(params) and params[i] is param

    def _find_places(self) -> None:
        self._places = {
            id(param): (index, i)
            for index, group in enumerate(self.param_groups)
            for i, param in enumerate(group["params"])
        }

    def _forget_plans(self) -> None:
        self._plan: Plan | None = None
        self._plan_key: Any = None
        self._plans_alone: dict[int, tuple[Plan, Any]] = {}  # by id of the parameter, which its plan keeps alive
        self._places = {}
        self._hyperparameters = hyperparameters.Hyperparameters(type(self))

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
        self._forget_plans()

    @property
    def _own_state(self) -> defaultdict[Tensor, Any]:
        # Under the name by which torch pickles and restores it.
        return self.__dict__["state"]

    def _plan_key_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What a plan depends on in a group, beside what is read anew each step."""
        return self._rule(group), group["backend"], group.get("state_dtype"), group["weights"], group["seed"]

    @torch.no_grad()
    def _make_plan(self, key: Any) -> Plan:
        groups = self._read_groups()
        items: list[Item] = []
        for index, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                items.append(self._item(_label(group, index, i), param, group, index, len(items)))
        # What is made for later steps must not be of one that runs in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            plan = Plan(items, groups, observes=self._observes)
        if not plan.read(groups, None):
            raise RuntimeError(
                "gradients changed while the step was being planned; is another thread running backward?"
            )
        self._plan, self._plan_key = plan, key
        return plan

    def _item(self, label: str, param: Tensor, group: dict[str, Any], index: int, number: int) -> Item:
        rule = self._rule(group)
        layout = self._layout(label, param, group)
        return Item(
            label,
            param,
            index,
            rule,
            group["backend"],
            takes_part=bool(self._own_state.get(param)) and param.dtype in FORMATS,
            check_state=lambda: _check_state(layout, self._own_state.get(param, {})),
            state=lambda: self._state_of(layout),
            watched_state=lambda: self._own_state[param],
            forms=tuple(layout.moments.values()),
            variance=lambda: getattr(param, "grad_variance", None),
            weights=group["weights"],
            seed=group["seed"],
            number=number,
        )

    def _layout(self, label: str, param: Tensor, group: dict[str, Any]) -> Layout:
        rule = self._rule(group)
        return Layout(
            label,
            param,
            dict(zip(rule.moments, rule.forms(group), strict=True)),
            effective_weights(group["weights"], param.dtype),
            rule.gate,
        )

    def _state_of(self, layout: Layout) -> State:
        """State of a parameter, made where it is missing: ``step``, moments, low bits or master, gate."""
        param = layout.param
        state = self._own_state[param]
        step = state.get("step", 0.0)
        if not isinstance(step, Tensor) or step.device.type != "cpu" or step.dtype != torch.float32 or step.dim() != 0:
            step = torch.full((), float(step), dtype=torch.float32)  # torch.tensor gives it autograd's data as well
            state["step"] = step
        strides = torch.empty_like(param, device="meta").stride()
        for name, form in layout.moments.items():
            if name not in state:
                state[name] = _huge_pages(allocate(form, param))
                state.update(said_beside(name, form))
            if form.packed:
                # Kernels read whole words of codes.
                if not state[name].is_contiguous() or state[name].data_ptr() % 16 != 0:
                    state[name] = state[name].clone(memory_format=torch.contiguous_format)
            elif not checks.same_strides(state[name], strides):
                state[name] = restrided(state[name], param)
        beside = None
        if layout.weights in BESIDE:
            name, _ = BESIDE[layout.weights]
            if name not in state:
                state[name] = make_beside(layout.weights, param, state.pop("param_low", None))
            elif not checks.same_strides(state[name], strides):
                state[name] = restrided(state[name], param)
            beside = state[name]
        gate = None
        if layout.gate is not None:
            gate = state.get(layout.gate)
            if gate is None:
                gate = torch.zeros((), dtype=torch.float64)
            gate = state[layout.gate] = gate.to(param.device)
        return State(tuple(state[name] for name in layout.moments), beside, gate, step)

    def _warn_of_variance(self, group: dict[str, Any]) -> None:
        """Few bits add variance to a momentum, the more of it the longer it remembers."""
        rule = self._rule(group)
        form = rule.forms(group)[0] if rule.moments else None
        limit = None if form is None or form.levels is None else VARIANCE_LIMIT.get(form.levels)
        if limit is not None and group["betas"][0] > limit and not self._has_warned:
            self._has_warned = True
            assert form is not None
            warnings.warn(
                f"{form.kind} momentum with beta = {group['betas'][0]}: the longer a momentum remembers, the more "
                f"variance rounding adds to it; beyond {limit} take more bits, or a smaller beta",
                stacklevel=6,  # past the constructors
            )

    def _fold_beta(self, group: dict[str, Any]) -> None:
        """A group keeps its one ``beta`` as ``betas=(beta,)``, where schedulers that cycle momentum look for it."""
        if "beta" in group and len(self.defaults.get("betas", ())) == 1:
            group["betas"] = (group.pop("beta"),)

    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Holds plain tensors and numbers, loads into any backend, storage form and parameter dtype.

        Moments are tensors of their parameters' shapes. Those kept in few bits become int8 codes, which needs one byte
        for each element while the dictionary lives: :meth:`save_state` does with one tensor at a time.
        """
        state_dict = super().state_dict()
        for number, layout in self._layouts():
            if number in state_dict["state"]:
                state_dict["state"][number] = export(layout, state_dict["state"][number])
        _drop_constructors(state_dict["param_groups"])
        state_dict["param_groups"] = [hyperparameters.kept(group) for group in state_dict["param_groups"]]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but state keeps its precision or takes this optimizer's.

        Hyperparameters and the seed come from the checkpoint; ``backend``, ``state_dtype`` and ``weights`` stay this
        optimizer's. Where that changes the precision of a state, one warning says how.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer; nothing has been loaded
                then.
        """
        loaded: dict[str, Any] = {}
        changes: list[str] = []

        def take(_: Optimizer, incoming: dict[str, Any]) -> None:
            loaded.update(incoming)
            for number, layout in self._check_groups(incoming["param_groups"]):
                if number in incoming["state"]:
                    check(layout, incoming["state"][number])

        def restore(_: Optimizer) -> None:
            # Optimizer.load_state_dict has cast state tensors to their parameter's dtype, shares the step counts, and
            # made generators of strings.
            changes.extend(self._restore(kept, loaded["param_groups"], lambda number: loaded["state"].get(number)))

        kept = self._constructors()
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()
        _warn_of_changes(changes)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Writes what :meth:`state_dict` holds, one tensor at a time, to a file that appears when it is complete.

        Args:
            path: of the file, which is replaced if there is one. It is a zip file with one member for each entry, each
                readable by ``torch.load(weights_only=True)``.
        """
        groups = [hyperparameters.kept(group) for group in Optimizer.state_dict(self)["param_groups"]]
        _drop_constructors(groups)
        with writer(path) as archive:
            write_head(archive, {"param_groups": groups})
            for number, layout in self._layouts():
                if state := self._own_state.get(layout.param):
                    write_entries(archive, number, ((name, export_entry(layout, state, name)) for name in state))

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Reads what :meth:`save_state` wrote, one tensor at a time, as :meth:`load_state_dict` would.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer; nothing has been loaded
                then.
            OSError, zipfile.BadZipFile: a file that cannot be read.
        """
        with zipfile.ZipFile(path) as archive:
            try:
                groups = read_head(archive)["param_groups"]
            except KeyError as error:
                raise ValueError(
                    f"{os.fspath(path)} was not written by save_state: load what torch.save has written by "
                    "load_state_dict(torch.load(...))"
                ) from error
            own = [len(group["params"]) for group in self.param_groups]
            if own != [len(group["params"]) for group in groups]:
                raise ValueError(
                    f"{os.fspath(path)} has groups of {[len(group['params']) for group in groups]} parameters: this "
                    f"optimizer has groups of {own}"
                )
            for number, layout in self._check_groups(groups):
                check(layout, read_entries(archive, number))
            kept = self._constructors()
            for group, saved in zip(self.param_groups, groups, strict=True):
                group.update({name: value for name, value in saved.items() if name != "params"})
            changes = self._restore(kept, groups, lambda number: read_entries(archive, number))
        _warn_of_changes(changes)

    def _layouts(self) -> list[tuple[int, Layout]]:
        """(number in a state dict, layout) of each parameter."""
        layouts: list[tuple[int, Layout]] = []
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                layouts.append((len(layouts), self._layout(_label(group, index, i), param, group)))
        return layouts

    def _constructors(self) -> list[dict[str, Any]]:
        return [_constructors_of(group) for group in self.param_groups]

    def _restore(
        self,
        kept: list[dict[str, Any]],
        saved_groups: list[dict[str, Any]],
        entries: Callable[[int], dict[str, Any] | None],
    ) -> list[str]:
        """Puts checked state in place, once the groups have the checkpoint's hyperparameters.

        Args:
            kept: what stays this optimizer's, by group.
            saved_groups: the checkpoint's, for its numbers.
            entries: a parameter's state by its number in the checkpoint, or nothing.

        Returns:
            What changed its precision, each change once.
        """
        for group, own in zip(self.param_groups, kept, strict=True):
            group.update(own)
        self._complete_groups()
        seeds = [group["seed"] for group in self.param_groups for _ in group["params"]]
        changes: dict[str, None] = {}
        for own_number, (number, layout) in enumerate(_paired(saved_groups, self._layouts())):
            self._own_state.pop(layout.param, None)
            if saved := entries(number):
                state, changed = adopt(layout, saved, seeds[own_number], own_number)
                changes.update(dict.fromkeys(changed))
                self._own_state[layout.param] = state
        self._forget_plans()
        return list(changes)

    def _complete_groups(self) -> None:
        """Gives groups of an earlier version, or of another optimizer, the hyperparameters that they lack."""
        for group in self.param_groups:
            self._fold_beta(group)
            for name, value in self.defaults.items():
                if name != "differentiable":  # which torch adds to the defaults, and to them alone
                    group.setdefault(name, value)

    def _check_groups(self, saved_groups: list[dict[str, Any]]) -> list[tuple[int, Layout]]:
        """(number in the checkpoint, layout) of each parameter, with the checkpoint's hyperparameters.

        Raises:
            TypeError, ValueError: hyperparameters that make no sense.
        """
        layouts = []
        for index, (saved, own) in enumerate(zip(saved_groups, self.param_groups, strict=False)):
            # The learning rate is not checked: schedulers may leave a rounding error below zero.
            group = {**self.defaults, **saved, "lr": 0.0, **_constructors_of(own)}
            self._fold_beta(group)
            self._check_group(group)
            for i, (number, param) in enumerate(zip(saved["params"], own["params"], strict=False)):
                layouts.append((number, self._layout(_label(own, index, i), param, group)))
        return layouts

    def __deepcopy__(self, memo: dict[int, Any]) -> SignOptimizer:
        """As by default, but functions in groups are shared: those of Triton cannot be copied."""
        for group in (self.defaults, *self.param_groups):
            memo.update((id(value), value) for value in group.values() if callable(value))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy may share its state with the original.
        self._state_is_out = self.__dict__.get("_state_is_out", True)
        super().__setstate__(state)
        self._observes, self._round = False, 0
        self._forget_plans()
        self._has_warned = True
        self._complete_groups()


def _huge_pages(moment: Tensor) -> Tensor:
    if moment.device.type == "cpu":
        load().advise_huge_pages(moment.data_ptr(), moment.nbytes)
    return moment


def _label(group: dict[str, Any], group_index: int, index: int) -> str:
    """What errors call a parameter."""
    names = group.get("param_names")
    return f"parameter {names[index]!r}" if names else f"parameter {index} of group {group_index}"


def _check_state(layout: Layout, state: dict[str, Any]) -> None:
    """Raises unless what there is of a parameter's state fits its rule. What else a user keeps there is left alone."""
    checks.weights(layout.label, layout.weights, layout.param.dtype)
    for name, form in layout.moments.items():
        if name in state:
            checks.moment(layout.label, name, state[name], layout.param, form)
            kind = state.get(kind_key(name))
            if kind is not None and kind != form.kind:
                raise ValueError(f"state {name!r} of {layout.label} is {kind}: must be {form.kind}; load it instead")
    if layout.weights in BESIDE:
        name, dtype = BESIDE[layout.weights]
        if name in state:
            label, param = f"state {name!r} of {layout.label}", layout.param
            checks.state_tensor(label, state[name], param.shape, (dtype,), param.device)
    if layout.gate is not None and layout.gate in state:
        checks.gate(layout.label, layout.gate, state[layout.gate])
    checks.step_count(layout.label, state.get("step", 0))


def _constructors_of(group: dict[str, Any]) -> dict[str, Any]:
    """What no checkpoint changes. Functions are among it, which a checkpoint cannot hold."""
    return {name: value for name, value in group.items() if name in CONSTRUCTORS or callable(value)}


def _drop_constructors(groups: list[dict[str, Any]]) -> None:
    for group in groups:
        for name in _constructors_of(group):
            del group[name]


def _warn_of_changes(changes: list[str]) -> None:
    if changes:
        warnings.warn(
            "the loaded state has been converted to this optimizer's storage forms (" + "; ".join(changes) + "): "
            "training goes on, but not bit for bit as it would have",
            stacklevel=3,
        )


def _keep_first_of_each(group: dict[str, Any]) -> None:
    """A parameter listed twice, which torch warns about, is updated once a step."""
    first: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(id(param), i)
    for name in ("params", "param_names"):
        if name in group:
            group[name] = [group[name][i] for i in first.values()]


def _paired(saved_groups: list[dict[str, Any]], layouts: list[tuple[int, Layout]]) -> list[tuple[int, Layout]]:
    """(number in the checkpoint, layout) of each parameter."""
    numbers = [number for group in saved_groups for number in group["params"]]
    return [(number, layout) for number, (_, layout) in zip(numbers, layouts, strict=True)]
