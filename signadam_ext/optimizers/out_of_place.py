"""The optimizers as functions of parameters, gradients and state that return new ones, for training with torch.func."""

from __future__ import annotations

import difflib
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..core import checks, hyperparameters, options, shards, tensors
from ..core.dynamo import untraced
from ..core.formats import outside_inference_mode
from ..engine.runtime import Runtime
from ..state.schema import fit
from .base import SignOptimizer
from .groups import GroupedOptimizer, layouts_of, posing_as
from .stepping import refuse_sums, step_all


class FunctionalOptimizer:
    """An optimizer without state of its own: ``init`` makes a state, and ``step`` new parameters and a new state.

    Parameters are a tensor or any structure of tensors that torch knows (``torch.utils._pytree``), mostly the
    dictionary that ``torch.func.functional_call`` takes. Gradients have the same structure, as ``torch.func.grad``
    returns them. So has the state, with a dictionary in place of each parameter: the entries of ``optimizer.state``,
    made in full by :meth:`init`.

    Nothing that is handed in is written, and nothing that comes out shares memory with it. Values have the bits of
    ``cls(params, **hyperparameters)`` in the same order of parameters, for every storage form. Each step copies
    parameters and state and looks at every tensor anew: where memory or the host's time counts, take the optimizer.

    Args:
        cls: an optimizer class of this package.
        hyperparameters: as its constructor takes them. All parameters have the same; where they are to differ, split
            the parameters, and take a second one.

    Raises:
        TypeError, ValueError: another class, or hyperparameters that it does not take.

    Example:
        >>> from torch.func import functional_call, grad
        >>> model = torch.nn.Linear(10, 1)
        >>> params = {name: param.detach() for name, param in model.named_parameters()}
        >>> optimizer = FunctionalOptimizer(SignAdamPP, lr=1e-3, state_dtype="int2")
        >>> state = optimizer.init(params)
        >>> def loss(params, x):
        ...     return functional_call(model, params, (x,)).square().mean()
        >>> for _ in range(3):
        ...     grads = grad(loss)(params, torch.randn(4, 10))
        ...     params, state = optimizer.step(params, grads, state)
        >>> state["weight"]["step"]
        tensor(3., dtype=torch.float64)
    """

    def __init__(self, cls: type[SignOptimizer], **hyperparameters: Any) -> None:
        if not (isinstance(cls, type) and issubclass(cls, SignOptimizer)):
            raise TypeError(f"cls={checks.shown(cls)}: must be an optimizer class of signadam_ext")
        self.cls = cls
        self.hyperparameters = hyperparameters
        made: Any = cls
        self._template: SignOptimizer = made([torch.empty(0)], **hyperparameters)
        refuse_sums(self._template, "FunctionalOptimizer")
        _refuse_largest_rate(self._template.param_groups[0])

    def __repr__(self) -> str:
        given = "".join(f", {name}={value!r}" for name, value in self.hyperparameters.items())
        return f"{type(self).__name__}({self.cls.__name__}{given})"

    @untraced
    def init(self, params: Any) -> Any:
        """The state before the first step.

        Args:
            params: fp32, bf16 or fp16 tensors in any structure; only their kinds matter, but for master copies.

        Returns:
            A structure like that of ``params``, with a dictionary for each.

        Raises:
            TypeError, ValueError: a parameter that cannot be served.
            RuntimeError: inside a transform of ``torch.func``.
        """
        _refuse_transforms()
        named, spec = _named(params)
        if not named:
            return pytree.tree_unflatten([], spec)
        with outside_inference_mode(), torch.no_grad():
            for name, param in named:
                tensors.parameter(f"parameter {name!r}", param, at_step=False)
            optimizer = self._made([(name, param.detach()) for name, param in named], {})
            seed = optimizer.param_groups[0]["seed"]
            made = [fit(layout, {}, seed, number).changes for number, layout in layouts_of(optimizer)]
        return pytree.tree_unflatten(made, spec)

    @untraced
    def step(
        self, params: Any, grads: Any, state: Any, *, grad_variances: Any = None, **changes: Any
    ) -> tuple[Any, Any]:
        """One step.

        Args:
            params: as handed to :meth:`init`, or returned by the last step. Where one requires a gradient, so does the
                new one, which is a leaf.
            grads: of the same structure, shapes and devices; fp32, bf16 or fp16. None leaves a parameter, and its
                state, as they are.
            state: as :meth:`init`, or the last step, returned it.
            grad_variances: the variances of the gradients, for rules that read them (``variance="minibatch"``).
            changes: hyperparameters of this step in place of those given before: ``lr=``, for example.

        Returns:
            The new parameters and the new state.

        Raises:
            TypeError, ValueError: structures that differ; a parameter, gradient, state or hyperparameter that cannot be
                served.
            RuntimeError: inside a transform of ``torch.func``, or where autograd would have to go through the step:
                with grad mode on, parameters with a history, or gradients that require a gradient, as those of
                ``create_graph=True`` do, and of ``torch.func.grad`` where the parameters do.
        """
        _refuse_transforms()
        named, spec = _named(params)
        given = _like(spec, "grads", grads)
        states = _like(spec, "state", state)
        variances = [None] * len(named) if grad_variances is None else _like(spec, "grad_variances", grad_variances)
        _refuse_history(named, given)
        if not named:
            return pytree.tree_unflatten([], spec), pytree.tree_unflatten([], spec)
        with outside_inference_mode(), torch.no_grad():
            copies = [param.detach().clone() for _, param in named]
            optimizer = self._made([(name, copy) for (name, _), copy in zip(named, copies, strict=True)], changes)
            for (name, _), copy, own in zip(named, copies, states, strict=True):
                if not isinstance(own, Mapping):
                    raise TypeError(
                        f"the state of {name} is a {type(own).__name__}: must be a dict, as init() makes it"
                    )
                optimizer.state[copy] = {key: _own(value) for key, value in own.items()}
            for (name, _), copy, grad, variance in zip(named, copies, given, variances, strict=True):
                if grad is not None:
                    if not (isinstance(grad, Tensor) and tensors.is_simulated(grad)):
                        tensors.gradient(f"parameter {name!r}", grad, copy)
                    tensors.give_gradient(copy, grad.detach())
                    vars(copy)["grad_variance"] = variance
            step_all(optimizer)
        for (_, param), copy in zip(named, copies, strict=True):
            copy.grad = None
            vars(copy).clear()
            copy.requires_grad_(param.requires_grad)
        made = [optimizer.state[copy] for copy in copies]
        return pytree.tree_unflatten(copies, spec), pytree.tree_unflatten(made, spec)

    def _made(self, named: Sequence[tuple[str, Tensor]], changes: Mapping[str, Any]) -> GroupedOptimizer:
        """An optimizer of these parameters, with the template's hyperparameters but for the changes.

        Raises:
            TypeError: a change of what is no hyperparameter.
        """
        template = self._template
        known = {*self.cls.HYPERPARAMETERS, *options.DEFAULTS, "beta"}
        for name in changes:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise TypeError(f"unknown hyperparameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        group = {**template.param_groups[0], **changes}
        _refuse_largest_rate(group)
        group["params"] = [param for _, param in named]
        group["param_names"] = [name for name, _ in named]
        made = posing_as(template, param_groups=[group], state={})
        made.runtime = Runtime(weakref.ref(cast(Any, made)), hyperparameters.Hyperparameters(self.cls))
        return made


def _refuse_largest_rate(group: Mapping[str, Any]) -> None:
    """Raises where decay is scaled by the largest learning rate so far, for which the state has no place."""
    if group["weight_decay_scale"] == "corrected":
        raise ValueError(
            "weight_decay_scale='corrected' in FunctionalOptimizer, which has no group that lasts to keep the largest "
            "learning rate so far in: take 'fully_decoupled', which is in proportion to the lr given at first"
        )


def _named(params: Any) -> tuple[list[tuple[str, Tensor]], Any]:
    """Each tensor of a structure and what errors call it, and the structure.

    Raises:
        TypeError: something else than plain tensors in it.
    """
    leaves, spec = pytree.tree_flatten_with_path(params)
    named = []
    for path, leaf in leaves:
        keys = [getattr(key, "key", None) for key in path]
        name = ".".join(map(str, keys)) if keys and all(isinstance(key, str) for key in keys) else pytree.keystr(path)
        name = name or "params"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"params has a {type(leaf).__name__} at {name!r}: must be tensors")
        if shards.is_sharded(leaf):
            raise TypeError(f"parameter {name!r} is a DTensor: the functional forms take plain tensors")
        named.append((name, leaf))
    return named, spec


def _like(spec: Any, label: str, given: Any) -> list[Any]:
    """What stands in a structure where the parameters stand in theirs.

    Raises:
        ValueError: it has another structure.
    """
    try:
        found: list[Any] = spec.flatten_up_to(given)
    except ValueError as error:
        raise ValueError(f"{label} has another structure than params: {error}") from None
    return found


def _refuse_transforms() -> None:
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "a step cannot be taken inside a transform of torch.func: take gradients inside it, and then the step; "
            "parameters of several models, stacked (torch.func.stack_module_state), are stepped at once"
        )


def _refuse_history(named: list[tuple[str, Tensor]], grads: list[Any]) -> None:
    if not torch.is_grad_enabled():
        return
    for (name, param), grad in zip(named, grads, strict=True):
        if param.requires_grad and not param.is_leaf:
            raise RuntimeError(
                f"parameter {name!r} has a history, and autograd does not go through a step: detach() it, or call "
                "step() under torch.no_grad()"
            )
        if isinstance(grad, Tensor) and grad.requires_grad:
            raise RuntimeError(
                f"the gradient of parameter {name!r} requires a gradient, and autograd does not go through a step: "
                "take it without create_graph=True, by torch.func.grad of detached parameters, or detach() it"
            )


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value
