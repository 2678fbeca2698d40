"""What all optimizers of this package share: groups, state, plans, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from ..core import checks, hyperparameters, options
from ..core.dynamo import untraced
from ..core.formats import effective_param_storage, outside_inference_mode
from ..core.renamed import names_today, warn_user
from ..core.rule import Group, Rule
from ..engine.plan import Item, Plan
from ..engine.runtime import Runtime
from ..engine.statistics import Statistics, collect
from ..state.archive import members_of, opened, read_entries, read_head, write_entry, write_head, writer
from ..state.checkpoint import Layout, adopt, check, export, realized, written_entry
from ..state.schema import Fitted, entry_names, fit

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: Group entries that stay the constructor's when a checkpoint is loaded.
CONSTRUCTORS = ("backend", "state_dtype", "param_storage")

#: Largest beta, by levels of a momentum's codes, that goes without a warning of the variance that rounding adds.
VARIANCE_LIMIT = {127: 0.99, 7: 0.95, 1: 0.9}

#: How often a step is planned where another thread gives or drops gradients meanwhile.
PLANNING_ATTEMPTS = 3


#: Names of hyperparameters that tell one method from another: those of torch.optim's optimizers, beside what they share
#: with ours, and of every subclass here.
_DISTINCTIVE = {
    *("beta", "momentum", "dampening", "nesterov", "amsgrad", "eps", "alpha", "centered", "rho", "etas", "step_sizes"),
    *("lambd", "t0", "momentum_decay", "lr_decay", "initial_accumulator_value", "beta2_decay", "d", "max_iter"),
    *("max_eval", "tolerance_grad", "tolerance_change", "history_size", "line_search_fn", "ns_coefficients"),
    *("ns_steps", "adjust_lr_fn"),
}


class SignOptimizer(Optimizer):
    """Base of the optimizers. A subclass names its rule and says what its own hyperparameters may be."""

    #: A group's hyperparameters beside those all optimizers share, each with what checks it.
    HYPERPARAMETERS: ClassVar[hyperparameters.Checks] = {"lr": hyperparameters.LEARNING_RATE}

    _runtime: Runtime

    #: Defaults of what it shares with the others, see :class:`options.Common`.
    COMMON: ClassVar[dict[str, Any]] = options.DEFAULTS
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Fills the docstring's placeholders, and spells out ``**common`` in the signature."""
        super().__init_subclass__(**kwargs)
        if cls.__doc__ is not None:
            cls.__doc__ = options.documented(cls.__doc__)
        cls.__signature__ = options.signature(cls.__init__, cls.COMMON)
        _DISTINCTIVE.update(cls.HYPERPARAMETERS)

    def __init__(self, params: Params, own: dict[str, Any], common: Mapping[str, Any]) -> None:
        hyperparameters.check_beta_names(type(self), common)
        defaults = hyperparameters.kept({**own, **options.completed(type(self).__name__, self.COMMON, common)})
        for name in checks.TORCH_OPTIONS:
            checks.torch_option(name, defaults.pop(name))
        self._runtime = Runtime(weakref.ref(self), hyperparameters.Hyperparameters(type(self)))
        defaults["seed"] = self._check_group(defaults)["seed"]  # schedulers change numbers, but no seed
        # In the groups, because flattened distributed checkpoints take what groups in memory have.
        defaults["method"] = self._method()
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
    def check_relations(cls, group: Group) -> None:
        """Raises on hyperparameters that make no sense together. Each by itself has been checked."""
        backends.check_usable(group["backend"])
        cls._rule(group).forms(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; hyperparameters it does not name take the optimizer's defaults.

        Raises:
            TypeError, ValueError: a hyperparameter or a parameter that cannot be served; the optimizer is unchanged.
        """
        if isinstance(param_group, dict):
            given, param_group = param_group, hyperparameters.kept(names_today(param_group))
            with hyperparameters.of_group(len(self.param_groups)):
                for name in checks.TORCH_OPTIONS:
                    checks.torch_option(name, param_group.get(name))
                hyperparameters.check_beta_names(type(self), param_group, folded=True)
                hyperparameters.fold(param_group, _has_one_beta(self.defaults))
                checked = self._check_group({**self.defaults, **param_group})
                param_group["seed"] = checked["seed"]
            # As in torch.optim, the dictionary that is handed in becomes the group.
            given.clear()
            given.update(param_group)
            param_group = given
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _keep_first_of_each(group)
            for i, param in enumerate(group["params"]):
                # A frozen parameter, quantized perhaps, never gets a gradient and may be of any kind.
                if param.requires_grad:
                    label = _label(group, len(self.param_groups) - 1, i)
                    checks.parameter(label, param, at_step=False)
                    checks.param_storage(label, group["param_storage"], param.dtype)
            self._warn_of_variance(group)  # which raises where warnings are errors
        except BaseException:
            self.param_groups.pop()
            raise
        self._runtime.forget_plans()
        if self._runtime.driver is not None:
            self._runtime.driver.extend(group["params"])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step: every parameter with a gradient, in one launch per device and rule.

        Args:
            closure: evaluates the model again and returns the loss.

        Raises:
            TypeError, ValueError: a parameter, gradient, state or hyperparameter that cannot be served, before anything
                is written.
            RuntimeError: a backend that cannot serve a parameter's device, or a step inside another one, before
                anything is written.

        Whatever else raises, a signal handler or a lack of memory, a step on the CPU and on the reference backend is
        taken as a whole or not at all.
        """
        driver = self._runtime.driver
        if driver is not None:
            return driver.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_all()
        return loss

    @untraced
    def _step_all(self) -> None:
        """The step of every parameter with a gradient."""
        runtime = self._runtime
        runtime.lock.refuse_nested()
        enabled = torch.is_grad_enabled()
        try:
            with runtime.lock.held:
                groups = self._read_groups()
                key = [self._plan_key_of(group) for group in groups]
                plan = runtime.plan
                if plan is None or key != runtime.plan_key or not plan.read(self.param_groups, self.state):
                    # The old one lets go of what it has read before the new one takes it.
                    runtime.plan = None
                    plan = self._make_plan(groups)
                plan.run(groups, runtime.lock)
                runtime.plan, runtime.plan_key = plan, key
                runtime.round += 1
                plan.round = runtime.round
        except BaseException:
            # A signal handler may have raised just before the plan lets go of what it has read.
            if runtime.plan is not None and runtime.plan.owns:
                runtime.plan = None
            raise
        finally:
            # Where a signal handler raises as torch.no_grad is left, gradients would stay disabled.
            torch._C._set_grad_enabled(enabled)

    def _step_parameter(self, param: Tensor) -> bool:
        """The step of one parameter, as if no other had a gradient; False where no group has it.

        The caller holds the lock.
        """
        runtime = self._runtime
        if self._parameter_of_id(id(param)) is not param:
            return False
        index, i = runtime.places[id(param)]
        group = self._read_group(index)
        param_id = i + sum(len(other["params"]) for other in self.param_groups[:index])
        key = (self._plan_key_of(group), param_id)
        # To its plan the parameter is the only one of the only group, so that reading takes no look at the others.
        alone = [{**group, "params": [param]}]
        own = self.state.get(param)
        plan, plan_key = runtime.plans_alone.get(id(param), (None, None))
        try:
            if plan is None or key != plan_key or not plan.read(alone, {} if own is None else {param: own}):
                runtime.plans_alone.pop(id(param), None)
                plan = self._plan_of([self._item(_label(group, index, i), param, group, 0, param_id)], alone)
            plan.run(alone, runtime.lock)
        except BaseException:
            if plan is not None and plan.owns:  # as above
                runtime.plans_alone.pop(id(param), None)
            raise
        runtime.plans_alone[id(param)] = plan, key
        plan.round = runtime.round
        return True

    def _read_group(self, index: int) -> dict[str, Any]:
        """A group with the hyperparameters that hold for this step, checked, as Python numbers."""
        return self._runtime.hyperparameters.read(index, self.param_groups[index], self.defaults)

    def _read_groups(self) -> list[dict[str, Any]]:
        read, defaults = self._runtime.hyperparameters.read, self.defaults
        return [read(index, group, defaults) for index, group in enumerate(self.param_groups)]

    def observe(self, enabled: bool = True) -> None:
        """Has every step from now on gather what :meth:`statistics` tells, in the pass that updates; or no longer.

        It takes time (on the CPU about as long again as the step) and 48 bytes for each 16384 entries. Nothing of it
        enters a checkpoint, and a copy of the optimizer does not observe.
        """
        checks.flag("enabled", enabled)
        runtime = self._runtime
        runtime.lock.refuse_nested()
        if enabled != runtime.observes:
            runtime.observes = enabled
            runtime.forget_plans()

    def statistics(self) -> Statistics:
        """What the last step did, tensor by tensor and in all. Nothing waits for the device before this is called.

        Raises:
            RuntimeError: nothing has been observed: :meth:`observe` was not called, or no step has been taken since.
        """
        runtime = self._runtime
        if not runtime.observes:
            raise RuntimeError("nothing is observed: call optimizer.observe() before the steps you want to look at")
        known = (runtime.plan, *(plan for plan, _ in runtime.plans_alone.values()))
        plans = [plan for plan in known if plan is not None and plan.round == runtime.round > 0]
        if not plans:
            raise RuntimeError("no step has been taken since optimizer.observe(), so there is nothing to tell")
        return collect(plans)

    def _parameter_of_id(self, key: int) -> Tensor | None:
        """The parameter of that id, if a group has it."""
        places = self._runtime.places
        for attempt in range(2):
            index, i = places.get(key, (0, -1))
            params = self.param_groups[index]["params"] if index < len(self.param_groups) else ()
            if 0 <= i < len(params) and id(params[i]) == key:
                return cast(Tensor, params[i])
            if attempt == 0:  # parameters may have moved
                places = self._runtime.places = {
                    id(param): (index, i)
                    for index, group in enumerate(self.param_groups)
                    for i, param in enumerate(group["params"])
                }
        return None

    def _plan_key_of(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """What a plan depends on in a group, beside what is read anew each step."""
        return self._rule(group), group["backend"], group.get("state_dtype"), group["param_storage"], group["seed"]

    def _make_plan(self, groups: Sequence[dict[str, Any]]) -> Plan:
        items: list[Item] = []
        for index, group in enumerate(groups):
            for i, param in enumerate(group["params"]):
                items.append(self._item(_label(group, index, i), param, group, index, len(items)))
        return self._plan_of(items, groups)

    def _plan_of(self, items: list[Item], groups: Sequence[dict[str, Any]]) -> Plan:
        """A plan that has read its first gradients."""
        # What is made for later steps must not be of one that runs in inference mode.
        for _ in range(PLANNING_ATTEMPTS):
            with outside_inference_mode(), torch.no_grad():
                plan = Plan(items, state=self.state, observes=self._runtime.observes)
            if plan.read(groups, self.state):
                self._runtime.coded.update(
                    (id(entry.param), (entry.param.shape, tuple(x.data_ptr() for x in entry.moments)))
                    for entry in plan.entries
                    if any(form.packed for form in entry.forms)
                )
                return plan
        raise RuntimeError("gradients changed while the step was being planned; is another thread running backward?")

    def _item(self, label: str, param: Tensor, group: dict[str, Any], index: int, param_id: int) -> Item:
        layout = self._layout(label, param, group)
        own = self.state.get(param)
        return Item(
            label,
            param,
            index,
            self._rule(group),
            group["backend"],
            has_state=bool(own),
            fit=lambda: self._fitted(layout, {} if own is None else own, group["seed"], param_id),
            forms=tuple(layout.moments.values()),
            own_state=own,
            state_names=entry_names(layout),
            param_storage=group["param_storage"],
            seed=group["seed"],
            param_id=param_id,
            # Torch makes the state that a distributed checkpoint is read into by a step without a learning rate.
            at_rest=not own and group["lr"] == 0,
        )

    def _fitted(self, layout: Layout, own: Mapping[str, Any], seed: int, param_id: int) -> Fitted:
        fitted = fit(layout, own, seed, param_id)
        shape, addresses = self._runtime.coded.get(id(layout.param), (layout.param.shape, ()))
        if shape != layout.param.shape:
            for (name, form), moment in zip(layout.moments.items(), fitted.moments, strict=True):
                # What has just been made may lie where an old one was.
                if form.packed and moment is own.get(name) and moment.data_ptr() in addresses:
                    raise ValueError(
                        f"state {name!r} of {layout.label} holds {form.kind} codes for the shape {tuple(shape)}, which "
                        f"the parameter had at the last step: it has {tuple(layout.param.shape)} now"
                    )
        return fitted

    def _layout(self, label: str, param: Tensor, group: dict[str, Any]) -> Layout:
        rule = self._rule(group)
        return Layout(
            label,
            param,
            dict(zip(rule.moments, rule.forms(group), strict=True)),
            effective_param_storage(group["param_storage"], param.dtype),
            rule.threshold_state,
            # A function of the user's may be larger than 1.
            bounded=rule.bounded and rule.confidence is None,
            uses_step=rule.uses_step,
        )

    def _warn_of_variance(self, group: dict[str, Any]) -> None:
        """Few bits add variance to a momentum, the more of it the longer it remembers."""
        rule = self._rule(group)
        form = rule.forms(group)[0] if rule.moments else None
        limit = None if form is None or form.levels is None else VARIANCE_LIMIT.get(form.levels)
        if limit is not None and group["betas"][0] > limit and not self._runtime.has_warned:
            self._runtime.has_warned = True
            assert form is not None
            warn_user(
                f"{form.kind} momentum with beta = {group['betas'][0]}: the longer a momentum remembers, the more "
                f"variance rounding adds to it; beyond {limit} take more bits, or a smaller beta"
            )

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As in torch.optim. Holds plain tensors and numbers, loads into any backend, storage form and parameter dtype.

        Moments are tensors of their parameters' shapes. Those kept in few bits become int8 codes, which needs one byte
        for each element while the dictionary lives: :meth:`save_state` does with one tensor at a time. Each group says
        its ``method``, and of a function among its hyperparameters the name.

        Hooks of :meth:`register_state_dict_post_hook` get the dictionary as it is returned.

        Raises:
            TypeError, ValueError: a moment kept in few bits, of a parameter that has been offloaded or resized.
            RuntimeError: a step on another thread runs a confidence function, which may wait for this thread.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        with self._between_steps():
            numbers = self._numbers()
            state = {
                numbers[id(key)] if isinstance(key, Tensor) else key: entries for key, entries in self.state.items()
            }
            for number, layout in self._layouts():
                if number in state:
                    state[number] = export(layout, state[number])
            state_dict: dict[str, Any] = {"state": state, "param_groups": self._exported_groups(numbers)}
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        """A step on another thread is of before or of after."""
        self._runtime.lock.refuse_waiting(
            "the state was asked for while a step on another thread runs a confidence function: does that function "
            "wait for this thread?"
        )
        with self._runtime.lock.held:
            yield

    def _numbers(self) -> dict[int, int]:
        """By the parameters' ids, the numbers under which a checkpoint lists them."""
        numbers: dict[int, int] = {}
        for number, param in enumerate(param for group in self.param_groups for param in group["params"]):
            numbers.setdefault(id(param), number)
        return numbers

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch.optim, but state keeps its precision or takes this optimizer's.

        Hyperparameters and the seed come from the checkpoint; ``backend``, ``state_dtype``, ``param_storage`` and
        functions stay this optimizer's. Where that changes the precision of a state, one warning says how. Everything
        is made before anything is put in place, so that both states are in memory for a moment.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer, another method's for
                example; nothing has been loaded then, nor after any other exception.
        """
        # Not by Optimizer.load_state_dict, which casts state to the parameters' dtypes on the way.
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            held = f" with {', '.join(map(repr, list(state_dict)[:5]))}" if isinstance(state_dict, Mapping) else ""
            raise TypeError(
                f"state_dict is a {type(state_dict).__name__}{held}: must be what an optimizer's state_dict() gives, a "
                "dict of 'state' and 'param_groups'"
            )
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            if changed is not None:
                state_dict = changed
        saved = state_dict["state"]
        if not isinstance(saved, Mapping):
            raise TypeError(f"'state' of the checkpoint is a {type(saved).__name__}: must be a dict")
        groups, numbered = self._checked_groups(state_dict["param_groups"])
        numbers = {number for number, _ in numbered}
        others = {key: value for key, value in saved.items() if key not in numbers}
        self._put_in_place(groups, numbered, saved.get, others)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Writes what :meth:`state_dict` holds, one tensor at a time, to a file that appears when it is complete.

        Args:
            path: of the file, which is replaced if there is one, and keeps its permissions. A symbolic link is
                followed. The file is a zip file with one member for each entry, each readable by
                ``torch.load(weights_only=True)``.

        Raises:
            TypeError, ValueError: as of :meth:`state_dict`; the old file is still there then.
            OSError: a path that cannot be written, or that is no regular file.
        """
        with self._between_steps():
            self._save_state(path)

    def _save_state(self, path: str | os.PathLike[str]) -> None:
        groups = self._exported_groups(self._numbers())
        state = self.state
        kept = [(number, layout, state[layout.param]) for number, layout in self._layouts() if state.get(layout.param)]
        others = {key: value for key, value in state.items() if not isinstance(key, Tensor)}
        with writer(path) as archive:
            members = members_of((number, entries) for number, _, entries in kept)
            write_head(archive, {"param_groups": groups, "others": others}, members)
            by_number = {number: (layout, entries) for number, layout, entries in kept}
            for member in members:
                layout, entries = by_number[member.number]
                write_entry(archive, member, written_entry(layout, entries, member.name))

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Reads what :meth:`save_state` wrote, one tensor at a time, as :meth:`load_state_dict` would.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer, or a file that is not as
                ``save_state`` wrote it; nothing has been loaded then, nor after any other exception.
            OSError, zipfile.BadZipFile: a file that cannot be read.
        """
        with opened(path) as archive:
            head, members = read_head(archive)
            groups, numbered = self._checked_groups(head["param_groups"])
            self._put_in_place(
                groups,
                numbered,
                lambda number: read_entries(archive, members.get(number, ())),
                head.get("others", {}),
            )

    def _exported_groups(self, numbers: Mapping[int, int]) -> list[dict[str, Any]]:
        """Groups as a checkpoint holds them: with their method, plain numbers, and names of functions."""
        return [
            {
                **{name: _portable(value) for name, value in hyperparameters.kept(group).items()},
                "params": [numbers[id(param)] for param in group["params"]],
                "method": self._method(),
            }
            for group in self.param_groups
        ]

    @classmethod
    def _method(cls) -> str:
        """The name of the class that defines the rule."""
        return next(base.__name__ for base in cls.__mro__ if "_rule" in vars(base))

    def _layouts(self) -> list[tuple[int, Layout]]:
        """(number in a state dict, layout) of each parameter."""
        layouts: list[tuple[int, Layout]] = []
        for index, group in enumerate(self.param_groups):
            hyperparameters.fold(group, _has_one_beta(self.defaults))
            for i, param in enumerate(group["params"]):
                layouts.append((len(layouts), self._layout(_label(group, index, i), param, group)))
        return layouts

    def _checked_groups(
        self, saved_groups: Sequence[Mapping[str, Any]]
    ) -> tuple[list[dict[str, Any]], list[tuple[Any, Layout]]]:
        """A checkpoint's groups as this optimizer is to have them, and (number there, layout) of each parameter.

        Raises:
            TypeError, ValueError: other numbers of groups or parameters, another method's groups, hyperparameters that
                make no sense.
        """
        if len(saved_groups) != len(self.param_groups):
            raise ValueError(
                f"the checkpoint has a different number of parameter groups, {len(saved_groups)}: must have "
                f"{len(self.param_groups)}"
            )
        groups, numbered = [], []
        for index, (saved, own) in enumerate(zip(saved_groups, self.param_groups, strict=True)):
            if not isinstance(saved, Mapping) or "params" not in saved:
                raise ValueError(f"group {index} of the checkpoint has no 'params': must be as state_dict() gives it")
            if len(saved["params"]) != len(own["params"]):
                raise ValueError(
                    f"group {index} of the checkpoint has {len(saved['params'])} parameters, which does not match the "
                    f"size of the optimizer's, {len(own['params'])}"
                )
            self._check_method(index, saved)
            saved = names_today(saved, warns=False)
            kept = _constructors_of(own)
            group = {
                name: value if callable(value) else copy.deepcopy(value)
                for name, value in saved.items()
                if name not in ("params", "method", *kept)
            }
            group.update(kept)
            _complete(group, self.defaults)
            if "param_names" in own:
                group.setdefault("param_names", own["param_names"])
            self._adapt_group(group, saved)
            for name in self.HYPERPARAMETERS:
                if _is_function_name(saved.get(name)) and name not in kept:
                    raise ValueError(
                        f"{name}={saved[name]!r} of group {index} of the checkpoint is a function, which no checkpoint "
                        f"holds: construct the optimizer with {name}= that function, and then load"
                    )
            with hyperparameters.of_group(index, "of the checkpoint"):
                lr = hyperparameters.learning_rate(group["lr"], group, self.defaults)
                self._check_group({**group, "lr": max(lr, 0.0)})
            group["params"] = own["params"]
            groups.append(group)
            for i, (number, param) in enumerate(zip(saved["params"], own["params"], strict=True)):
                numbered.append((number, self._layout(_label(own, index, i), param, group)))
        return groups, numbered

    def _check_method(self, index: int, saved: Mapping[str, Any]) -> None:
        """Raises where a group of a checkpoint is of another method."""
        ours, method = self._method(), saved.get("method")
        if method is not None:
            if method != ours:
                raise ValueError(f"group {index} of the checkpoint is of the method {method}: must be of {ours}")
            return
        known = {*self.defaults, *self.HYPERPARAMETERS, "beta"}
        foreign = sorted(name for name in saved if name in _DISTINCTIVE and name not in known)
        if foreign:
            raise ValueError(
                f"group {index} of the checkpoint has the hyperparameter {foreign[0]!r}, which {ours} has not: it is "
                "of another method"
            )

    def _adapt_group(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Where a subclass reads a group of a checkpoint otherwise than it stands there."""

    def _put_in_place(
        self,
        groups: list[dict[str, Any]],
        numbered: list[tuple[Any, Layout]],
        entries: Callable[[Any], Mapping[str, Any] | None],
        others: Mapping[Any, Any],
    ) -> None:
        """Makes the state that a checkpoint holds, warns of what changes, and then takes it and the groups at once.

        Args:
            groups: the new ones.
            numbered: (number in the checkpoint, layout) of each parameter.
            entries: a parameter's state by its number in the checkpoint, or nothing.
            others: state of no parameter.
        """
        changes: dict[str, None] = {}
        state: defaultdict[Any, Any] = defaultdict(dict, others)
        seeds = [group["seed"] for group in groups for _ in group["params"]]
        enabled = torch.is_grad_enabled()
        try:
            # What is made for later steps must not be of inference mode.
            with outside_inference_mode(), torch.no_grad():
                for own_number, (number, layout) in enumerate(numbered):
                    found = entries(number)
                    if found is None or _is_empty(found):
                        continue
                    saved = realized(layout, found)
                    check(layout, saved)
                    state[layout.param], changed = adopt(layout, saved, seeds[own_number], own_number)
                    changes.update(dict.fromkeys(changed))
        finally:
            # As in a step.
            torch._C._set_grad_enabled(enabled)
        _warn_of_changes(list(changes))  # which raises where warnings are errors
        runtime = self._runtime
        runtime.lock.refuse_nested()
        with runtime.lock.held:
            # An object that poses as the optimizer's class would keep it to itself. One that has copied the attributes
            # has the old ones still.
            owner = runtime.owner() or self
            owner.__setstate__({"state": state, "param_groups": groups})
            if owner is not self:
                attributes = vars(self)
                attributes.update({name: vars(owner)[name] for name in ("state", "param_groups") if name in attributes})

    def __deepcopy__(self, memo: dict[int, Any]) -> SignOptimizer:
        """As by default, but functions in groups are shared: those of Triton cannot be copied."""
        for group in (self.defaults, *self.param_groups):
            memo.update((id(value), value) for value in group.values() if callable(value))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what a copy, a pickle or a checkpoint holds. All of it is put in place by one assignment."""
        taken = dict(state)
        runtime = self.__dict__.get("_runtime")
        if runtime is None:
            runtime = Runtime(weakref.ref(self), hyperparameters.Hyperparameters(type(self)), has_warned=True)
            taken["_runtime"] = runtime
        taken["defaults"] = defaults = names_today({**vars(self), **state}["defaults"], warns=False)
        for group in state.get("param_groups", ()):
            _complete(group, defaults)
        # Plans compare groups and state with what they know; what was observed is of before.
        runtime.forget_plans()
        # torch's own begins by updating the attributes' dict, at once.
        super().__setstate__(taken)


def _label(group: dict[str, Any], group_index: int, index: int) -> str:
    """What errors call a parameter."""
    names = group.get("param_names")
    if isinstance(names, (list, tuple)) and index < len(names):  # parameters may have been appended without a name
        return f"parameter {names[index]!r}"
    return f"parameter {index} of group {group_index}"


def _has_one_beta(defaults: Mapping[str, Any]) -> bool:
    return len(defaults.get("betas", ())) == 1


def _complete(group: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Gives a group of an earlier version, or of another optimizer, the hyperparameters that it lacks."""
    hyperparameters.fold(group, _has_one_beta(defaults), warns=False)
    for name, value in defaults.items():
        if name != "differentiable":  # which torch adds to the defaults, and to them alone
            group.setdefault(name, value)


def _constructors_of(group: dict[str, Any]) -> dict[str, Any]:
    """What no checkpoint changes. Functions are among it, which a checkpoint cannot hold."""
    return {name: value for name, value in group.items() if name in CONSTRUCTORS or callable(value)}


def _portable(value: Any) -> Any:
    """A group's entry as a checkpoint holds it: a function by its qualified name."""
    if callable(value) and not isinstance(value, Tensor):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}"
    return value


def _is_function_name(value: Any) -> bool:
    """Whether this stands for a function in a checkpoint. No name of a choice has a dot in it."""
    return isinstance(value, str) and "." in value


def _is_empty(saved: Any) -> bool:
    """Whether a checkpoint has no state of a parameter. A flattened one gives an empty dict for each entry."""
    return isinstance(saved, Mapping) and all(isinstance(value, dict) and not value for value in saved.values())


def _warn_of_changes(changes: list[str]) -> None:
    if changes:
        warn_user(
            "the loaded state has been converted to this optimizer's storage forms (" + "; ".join(changes) + "): "
            "training goes on, but not bit for bit as it would have"
        )


def _keep_first_of_each(group: dict[str, Any]) -> None:
    """A parameter listed twice, which torch warns about, is updated once a step."""
    first: dict[int, int] = {}
    for i, param in enumerate(group["params"]):
        first.setdefault(id(param), i)
    for name in ("params", "param_names"):
        if name in group:
            group[name] = [group[name][i] for i in first.values()]
