"""The base of all optimizers of this package: what a user calls. What it takes to do it lies beside it."""

from __future__ import annotations

import copy
import difflib
import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypeAlias, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import backends
from ..core import checks, hyperparameters, modifiers, options, shards, tensors
from ..core.dynamo import untraced
from ..core.renamed import names_today, warn_user
from ..core.rule import Group, Rule, RuleChoice, method_of, rule_of
from ..engine.runtime import Runtime
from ..engine.statistics import Statistics, collect
from . import checkpoints
from .graph import goes_into_graphs, step_in_graph
from .groups import complete, keep_first_of_each, label, warn_of_variance
from .stepping import step_all

Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

#: How alike names are of which one is taken for the other misspelt, as difflib measures it.
NEARLY = 0.85


class SignOptimizer(Optimizer):
    """What the optimizers share, in full. A subclass declares its rule, and what its own hyperparameters may be.

    **Hyperparameters.** Any number may be NumPy's, or a CPU tensor of one element, which is read at every step. Groups
    are checked at every step as the constructor checks its arguments, but for a learning rate that a scheduler's
    rounding left just below 0. With ``decoupled_weight_decay``, ``p *= 1 - lr * weight_decay`` comes before the update;
    without, ``g += weight_decay * p`` before everything else.

    **Moments**, by ``state_dtype``. "bf16" is rounded stochastically. Where a momentum of signs cannot exceed 1
    (:class:`SignAdam`, :class:`SignAdamPP` without a function of your own), "int8", "int4" and "int2" are codes q that
    stand for q / 127, q / 7 or q; they need no scale. :class:`LaProp` has them for small betas, with a bound of its
    own. Rounding is stochastic, so that the stored momentum is right on
    average, and its variance grows: a warning comes beyond the ``beta`` that each form allows. For any other momentum
    "int8" is a code with one power of two for each 32 elements in memory order. The power goes down to 2^-126, so
    however small a block is, it is right on average; nothing is flushed to zero as with 16-bit scales. Infinities
    saturate at 127 times the power, NaN stays NaN. This is the one form whose bits depend on where a tensor's memory
    begins.

    **Parameters** of bf16 or fp16, by ``param_storage``. "nearest": rounded to nearest, so that steps below half its
    last place are lost. "stochastic": rounded up or down at random, right on average. "split16", "split8" (not of
    fp16): the low 16 bits of fp32, so that the optimizer updates an exact fp32 weight of 4 bytes, or the next 8 and the
    rest stochastically, are kept beside it. "master": an fp32 copy is. An fp32 parameter is its own master under each
    of them. A parameter that is set from outside wins over a master copy; low bits stay as they were,
    and are added to it.

    **Random bits** are a function of ``seed``, parameter, step and element, so they are the same on every backend and
    in a resumed run; no global generator is touched.

    **State** of each parameter: the moments, ``step``, with split weights ``param_low``, with master weights
    ``master_param``. A moment in codes is a packed buffer, with the numbers ``..._kind``, ``..._order`` (of the
    dimensions in memory) and, if it is scale-free, ``..._levels`` beside it.

    Attributes:
        runtime: plans, lock and what else the engine keeps of this optimizer; no part of the interface.
    """

    #: The rule that updates a group, or what chooses one by its hyperparameters.
    RULE: ClassVar[Rule | RuleChoice]

    #: A group's hyperparameters beside those all optimizers share, each with what checks it.
    HYPERPARAMETERS: ClassVar[hyperparameters.Checks] = {"lr": hyperparameters.LEARNING_RATE}

    #: What groups keep beside them, and no constructor takes.
    KEPT: ClassVar[frozenset[str]] = frozenset()

    runtime: Runtime

    #: Names of what it shares with the others.
    COMMON: ClassVar[frozenset[str]] = options.COMMON

    #: Whether a class has an `of_this_step` of its own.
    FOLLOWS_STEPS: ClassVar[bool] = False
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Spells out ``**others`` in the signature."""
        super().__init_subclass__(**kwargs)
        cls.FOLLOWS_STEPS = cls.of_this_step is not SignOptimizer.of_this_step
        cls.__signature__ = options.signature(cls.__init__)
        checkpoints.DISTINCTIVE.update(cls.HYPERPARAMETERS)

    def __init__(self, params: Params, given: Mapping[str, Any], others: Mapping[str, Any]) -> None:
        hyperparameters.check_beta_names(type(self), others)
        defaults = hyperparameters.kept(options.completed(type(self).__name__, given, others, self.KEPT))
        asked = {name: checks.torch_option(name, defaults.pop(name)) for name in checks.TORCH_OPTIONS}
        self.runtime = Runtime(weakref.ref(self), hyperparameters.Hyperparameters(type(self)))
        self._ask(asked)
        _keep_rates(defaults)
        # Schedulers change numbers, but no seed.
        defaults["seed"] = hyperparameters.checked(type(self), defaults, asked["capturable"])["seed"]
        # In the groups, because flattened distributed checkpoints take what groups in memory have.
        defaults["method"] = method_of(type(self))
        super().__init__(params, defaults)

    def _ask(self, options: dict[str, bool]) -> None:
        """Takes what was asked for of :data:`checks.TORCH_OPTIONS`."""
        self._asked = options
        if options.get("fused"):
            # As in torch.optim: a GradScaler leaves it to the step to scale gradients back and to skip it.
            self._step_supports_amp_scaling = True
        self.runtime.begins_on_device = self.runtime.hyperparameters.on_device = options.get("capturable", False)

    @classmethod
    def check_relations(cls, group: Group) -> None:
        """Raises on hyperparameters that make no sense together. Each by itself has been checked."""
        backends.check_usable(group["backend"])
        rule = rule_of(cls, group)
        rule.forms(group)
        modifiers.check(group, rule_of(cls, {**group, **modifiers.DEFAULTS}))
        if rule.reads_variance and group["max_grad_norm"] is not None:
            raise ValueError(
                f"max_grad_norm={group['max_grad_norm']!r} with a rule that reads param.grad_variance, which would "
                "have to be scaled as well: clip before the variance is taken"
            )

    def of_this_step(self, group: dict[str, Any]) -> dict[str, Any]:
        """The group, as it has been read, with what a subclass that `FOLLOWS_STEPS` makes of it. It stays as it is.

        Raises:
            RuntimeError: no step may be taken.
        """
        return group

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
                hyperparameters.fold(param_group, options.has_one_beta(self.defaults))
                modifiers.check_group_scale(param_group, self.defaults)
                self._warn_of_misspelt(param_group)
                _keep_rates(param_group, self.defaults)
                given_now = {**self.defaults, **param_group}
                checked = hyperparameters.checked(type(self), given_now, self._asked.get("capturable", False))
                param_group["seed"] = checked["seed"]
            # As in torch.optim, the dictionary that is handed in becomes the group.
            given.clear()
            given.update(param_group)
            param_group = given
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            keep_first_of_each(group)
            for i, param in enumerate(group["params"]):
                # A frozen parameter, quantized perhaps, never gets a gradient and may be of any kind.
                if param.requires_grad:
                    name = label(group, len(self.param_groups) - 1, i)
                    shards.sharding_of(name, param)
                    tensors.parameter(name, shards.local(param), at_step=False)
                    tensors.param_storage(name, group["param_storage"], param.dtype)
            warn_of_variance(self, group)  # which raises where warnings are errors
        except BaseException:
            self.param_groups.pop()
            raise
        self.runtime.forget_plans()
        self.runtime.has_compared = False
        self.runtime.has_shards |= any(map(shards.is_sharded, group["params"]))
        if self.runtime.driver is not None:
            self.runtime.driver.extend(group["params"])

    def _warn_of_misspelt(self, group: Group) -> None:
        """Warns of names that are nearly those of hyperparameters. Groups take any other, as torch.optim's do."""
        known = {*self.defaults, *type(self).HYPERPARAMETERS, "params", "param_names"}
        known |= {"beta"} if options.has_one_beta(self.defaults) else set()
        for name in group:
            if isinstance(name, str) and name not in known:
                alike = [other for other in known if other.count("_") == name.count("_")]
                for near in difflib.get_close_matches(name, alike, n=1, cutoff=NEARLY):
                    # The same words of every group, so that Python says them once.
                    warn_user(f"a group has {name!r}, which is no hyperparameter: did you mean {near!r}?")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step: every parameter with a gradient, in one launch per device, rule and, on a GPU, storage form.

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
        driver = self.runtime.driver
        if driver is not None:
            return driver.step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if goes_into_graphs(self):
            step_in_graph(self)
        else:
            step_all(self)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim``'s. Gradients that :func:`signadam_ext.offload` has moved to the host are dropped, too."""
        if self.runtime.driver is not None:
            self.runtime.driver.zero_grad()
        super().zero_grad(set_to_none)

    @property
    def last_grad_norm(self) -> Tensor | None:
        """The norm of all gradients at the last step, before clipping, 0-dim float64; None without max_grad_norm.

        Of a step that has begun on a device it is there, and reading it waits for nothing.
        """
        norm = self.runtime.last_grad_norm
        if norm is None:
            return None
        return norm.clone() if isinstance(norm, Tensor) else torch.tensor(norm, dtype=torch.float64, device="cpu")

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps were skipped since this optimizer was made, 0-dim int64: gradients were not finite."""
        there = self.runtime.skips_there
        return (
            torch.tensor(self.runtime.skipped_steps, device="cpu")
            if there is None
            else there + self.runtime.skipped_steps
        )

    def observe(self, enabled: bool = True) -> None:
        """Turns on, or off, what :meth:`statistics` needs: every step gathers it in the pass that updates.

        It takes time (on the CPU three times the instructions of an fp32 step, which is less than that where memory is
        waited for; more with a division or in 16 or fewer bits) and 48 bytes for each 16384 entries. Nothing of it
        enters a checkpoint, and a copy of the optimizer does not observe.
        """
        checks.flag("enabled", enabled)
        runtime = self.runtime
        runtime.lock.refuse_nested()
        if enabled != runtime.observes:
            runtime.observes = enabled
            runtime.forget_plans()

    def statistics(self) -> Statistics:
        """What the last step did, tensor by tensor and in all. Nothing waits for the device before this is called.

        Raises:
            RuntimeError: nothing has been observed: :meth:`observe` was not called, or no step has been taken since.
        """
        runtime = self.runtime
        if not runtime.observes:
            raise RuntimeError("nothing is observed: call optimizer.observe() before the steps you want to look at")
        known = (runtime.plan, *(plan for plan, _ in runtime.plans_alone.values()))
        plans = [plan for plan in known if plan is not None and plan.round == runtime.round > 0]
        if not plans:
            raise RuntimeError("no step has been taken since optimizer.observe(), so there is nothing to tell")
        return collect(plans)

    @untraced
    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim``'s: tensors and numbers, which load into any backend, storage form and parameter dtype.

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
        state_dict = checkpoints.exported(self)
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    @untraced
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As ``torch.optim``'s, but state keeps its precision, or takes the precision that this optimizer stores.

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
        checkpoints.load(self, state_dict)
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
        checkpoints.save(self, path)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Reads what :meth:`save_state` wrote, one tensor at a time, as :meth:`load_state_dict` would.

        Raises:
            TypeError, ValueError: state or hyperparameters that do not fit this optimizer, or a file that is not as
                ``save_state`` wrote it; nothing has been loaded then, nor after any other exception.
            OSError, zipfile.BadZipFile: a file that cannot be read.
        """
        checkpoints.load_file(self, path)

    def adapt_loaded_group(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Changes a group of another optimizer's checkpoint where a subclass reads it otherwise."""

    def __deepcopy__(self, memo: dict[int, Any]) -> SignOptimizer:
        """Copies all but functions in groups, which are shared: those of Triton cannot be copied."""
        for group in (self.defaults, *self.param_groups):
            memo.update((id(value), value) for value in group.values() if callable(value))
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along."""
        return {**super().__getstate__(), "_asked": self._asked}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes what a copy, a pickle or a checkpoint holds. All of it is put in place by one assignment."""
        taken = dict(state)
        runtime = self.__dict__.get("runtime")
        if runtime is None:
            runtime = Runtime(weakref.ref(self), hyperparameters.Hyperparameters(type(self)), has_warned=True)
            taken["runtime"] = runtime
        if "defaults" in state:  # a copy or a pickle; a checkpoint has none
            taken["defaults"] = names_today(state["defaults"], warns=False)
        defaults = {**vars(self), **taken}["defaults"]
        for group in state.get("param_groups", ()):
            complete(group, defaults)
        # Plans compare groups and state with what they know; what was observed is of before.
        runtime.forget_plans()
        # torch's own begins by updating the attributes' dict, at once.
        super().__setstate__(taken)
        self._ask(vars(self).get("_asked", {}))  # none in a pickle of an earlier version
        runtime.has_shards = any(shards.is_sharded(param) for group in self.param_groups for param in group["params"])


def _keep_rates(group: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
    """Keeps the learning rate that a group begins with, unless it says what to keep.

    Args:
        group: that is added, or the defaults themselves.
        defaults: of the groups.
    """
    lr = group.get("lr", (defaults or group).get("lr"))
    for name in options.LARGEST_RATES:
        group.setdefault(name, lr.detach().clone() if isinstance(lr, Tensor) else lr)
