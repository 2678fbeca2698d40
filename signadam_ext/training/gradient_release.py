"""Updates inside backward: each parameter moves as soon as its gradient is complete, and the gradient is freed.

What makes that hard to misuse lives here as well. With the gradients gone, everything that needs all of them at once
would silently do nothing, so it is refused wherever it can be seen.
"""

from __future__ import annotations

import functools
import gc
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..core import checks, shards, tensors
from ..core.dynamo import untraced
from ..engine.overlap import overlap_levels
from ..optimizers.base import SignOptimizer
from ..optimizers.groups import label
from ..optimizers.stepping import NO_NORM, parameter_of_id, refuse_sums, step_all, step_parameter


def release_gradients(
    model_or_params: nn.Module | Iterable[Any],
    optimizer: SignOptimizer,
    *,
    accumulation_steps: int = 1,
    max_norm: float | None = None,
    grad_scaler: Any = None,
) -> GradientRelease:
    """Lets ``backward()`` take the steps: a parameter is updated once its gradient is complete, and the gradient freed.

    Instead of all gradients only those exist that backward is working on, which saves nearly the memory of the
    parameters once more. Parameters and state get the same bits as from an ordinary loop::

        release_gradients(model, optimizer)
        for inputs, targets in batches:
            loss_function(model(inputs), targets).backward()
            scheduler.step()

    ``optimizer.step()`` and ``optimizer.zero_grad()`` may stay in the loop. ``step()`` applies only the gradients that
    backward has left: of parameters that are not released, of an accumulation cut short, or written by hand. So keep it
    where the optimizer has trainable parameters beyond ``model_or_params``, and for the sake of step hooks. With a
    closure it runs the closure, whose backward takes the step.

    Frozen parameters are released from the moment they are unfrozen; groups added later are released if everything
    was. Learning rates and other hyperparameters are those at the time of backward. Hooks registered on a parameter
    before this call still see its gradient, later ones do not; those of ``Tensor.register_hook`` may change it, for
    instance clip it by value.

    The graph must not need a weight after its gradient is complete. Where it does (a second backward through the same
    graph, ``weight.detach()`` used beside ``weight``), autograd says that the weight "has been modified by an inplace
    operation". It says so as well of parameters that are views of one buffer, which have a version in common. On CUDA
    an update runs on the stream that completed the gradient; the stream of the call to ``backward()`` waits for it.

    Keep the optimizer, even where the loop never mentions it: parameters do not keep it alive. The returned object
    need not be kept. Copies and pickles of the optimizer are not released.

    **What cannot work with it** is an error, unless said otherwise:

    - ``DistributedDataParallel``, on any number of processes, and the flat parameters of FSDP's first version: they
      average a gradient only after it has been applied, so the processes would drift apart. A model wrapped later is
      found at the first backward, or else at the next ``step()``. Modules under ``fully_shard`` (FSDP2), which calls
      hooks with what it has reduced, are served.
    - Gradient accumulation by several backwards, unless ``accumulation_steps`` announces it. Once ``step()`` has been
      called, a parameter's second gradient since the last call is an error. In a loop that never calls it, every
      backward is a step.
    - Reentrant checkpointing (``use_reentrant=True``) of a parameter used in several segments. Its gradient arrives in
      parts, and the second is an error, when the first has been applied. Parameters used in one segment get the right
      update, but the loop must call ``step()``, or the next backward would look like another part.
    - Parameters that share memory, which would be updated in another order.
    - Steps taken as a whole: where backward raises, a lack of memory or Ctrl-C, parameters that it has updated stay so,
      each with its own count of steps, and the others have kept their values. The loop may go on with
      ``optimizer.zero_grad()`` and the next backward.
    - ``GradScaler``: it looks at all gradients to decide whether the step is taken. An enabled one is refused in
      ``scaler.step(optimizer)``, which is one backward too late, or here if it is given as ``grad_scaler``.
    - Clipping by the norm of all gradients, which is known only when the last of them is complete and the others are
      gone. This **goes unnoticed**: ``clip_grad_norm_`` finds no gradient, returns 0 and changes nothing. Give the
      loop's ``max_norm`` here to have it refused. Where only signs count (SignAdam, and ``alpha=0`` but for Signum) it
      would change nothing anyway. The optimizer's own ``max_grad_norm`` is refused.

    Args:
        model_or_params: a module, or parameters in any form that optimizers take. Those that are not the optimizer's
            are left alone.
        optimizer: one of this package.
        accumulation_steps: how many backwards make one step. Gradients are summed as always (so divide the loss), and
            each is freed after the last of them; between, all exist, and no memory is saved. ``zero_grad()`` (to None)
            begins anew.
        max_norm: the loop's, to be refused unless it is None or infinite.
        grad_scaler: the loop's, to be refused if it is enabled.

    Returns:
        The release, which ends with its ``remove()`` or, used as a context manager, with its block.

    Raises:
        TypeError: arguments of other kinds.
        ValueError: clipping, loss scaling, no parameter in common with the optimizer, or parameters that share memory.
        RuntimeError: gradients are released already, the model is distributed in one of those ways, a parameter holds a
            gradient, or is a DTensor and ``accumulation_steps`` is not 1.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SignAdamPP(model.parameters())
        >>> release = release_gradients(model, optimizer)
        >>> model(torch.randn(4, 10)).square().mean().backward()  # takes the step
        >>> model.weight.grad is None
        True
    """
    if not isinstance(optimizer, SignOptimizer):
        raise TypeError(
            f"optimizer is a {checks.class_name(optimizer)}: release_gradients serves the optimizers of "
            "signadam_ext, which can step one parameter at a time"
        )
    if isinstance(accumulation_steps, bool) or not isinstance(accumulation_steps, int):
        raise TypeError(f"accumulation_steps={accumulation_steps!r}: must be an int")
    if accumulation_steps < 1:
        raise ValueError(f"accumulation_steps={accumulation_steps!r}: must be at least 1")
    if max_norm is not None and max_norm != math.inf:
        raise ValueError(
            f"max_norm={max_norm!r}: the norm of all gradients is known only when the last of them is complete, and by "
            "then the others have been applied and freed; clip each by value with Tensor.register_hook, or do not "
            "release gradients"
        )
    if grad_scaler is not None and not callable(getattr(grad_scaler, "is_enabled", None)):
        raise TypeError(f"grad_scaler is a {type(grad_scaler).__name__}: must be a torch.amp.GradScaler")
    if grad_scaler is not None and grad_scaler.is_enabled():
        raise ValueError(f"grad_scaler={type(grad_scaler).__name__}: {_NO_SCALER}")
    # A trainer may have wrapped it in an object that poses as its class.
    optimizer = cast(SignOptimizer, optimizer.runtime.owner() or optimizer)
    if optimizer.runtime.driver is not None:
        how = (
            "gradients are released" if isinstance(optimizer.runtime.driver, GradientRelease) else "steps are offloaded"
        )
        raise RuntimeError(f"this optimizer's {how} already: call remove() of what has done that first")
    if any(group.get("max_grad_norm") is not None for group in optimizer.param_groups):
        raise ValueError(NO_NORM)
    refuse_sums(optimizer, "release_gradients")
    params = _parameters_of(model_or_params)
    if isinstance(model_or_params, nn.Module):
        for name, module in model_or_params.named_modules():
            _refuse_wrapper(name, module)
    release = GradientRelease(optimizer, params, accumulation_steps)
    optimizer.runtime.driver = release
    return release


_NO_SCALER = (
    "GradScaler cannot be used while gradients are released: it decides after backward whether the gradients are "
    "finite and divides them by its scale, but backward has applied and freed them by then; train in bfloat16, which "
    "needs no scaler, or pass GradScaler(enabled=False)"
)


@dataclass(slots=True, eq=False)
class _Progress:
    """What is remembered of a released parameter.

    Attributes:
        implementation: where torch keeps what the tensor is. ``torch.utils.swap_tensors`` gives a parameter another,
            which has none of its hooks.
        window: number of the window (from one ``step()`` to the next) in which it was last updated.
        task: number of the backward that last brought a gradient.
        nested: whether that backward ran inside another one.
        backwards: how many gradients have been summed up.
        refused: the gradient that a step has refused and left, by torch's object and its version then.
    """

    implementation: int
    window: int = -1
    task: int = -1
    nested: bool = False
    backwards: int = 0
    refused: tuple[int, int] | None = None


class GradientRelease:
    """What :func:`release_gradients` returns; also a context manager, which removes it at the end.

    Made only by that function.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SignAdamPP(model.parameters())
        >>> with release_gradients(model, optimizer):
        ...     model(torch.randn(4, 10)).square().mean().backward()  # takes the step
    """

    def __init__(self, optimizer: SignOptimizer, params: list[Tensor], accumulation_steps: int) -> None:
        self.accumulation_steps = accumulation_steps
        # Torch's tensors do not show their hooks to the garbage collector: whatever those hold on to for good, lives
        # for good. They hold this object weakly, and it holds the optimizer weakly.
        self.optimizer = weakref.ref(optimizer)
        self._progress: dict[int, _Progress] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._removed = False
        self._window = 0
        self._task = -1
        self._running: set[int] = set()  # backwards that have begun and not come to their end
        self._nested = False
        self._step_called = False
        self._others = False
        self._searched = False
        own = _own_parameters(optimizer)
        given = {id(param) for param in params}
        common = [param for param in own if id(param) in given]
        self._released_all = len(common) == len(own)
        if not common:
            raise ValueError(
                "none of these parameters is the optimizer's: release those it was made with (a copy of a model has "
                "others)"
            )
        for param in common:
            if param.grad is not None:
                raise RuntimeError(
                    f"{_name(optimizer, param)} holds a gradient, to which the next backward would add: call "
                    "optimizer.zero_grad() before gradients are released"
                )
            if shards.is_flattened(param):
                raise RuntimeError(f"{_name(optimizer, param)} is, or lies in, a flat parameter: {_NO_FSDP}")
            if accumulation_steps > 1 and shards.is_sharded(param):
                raise RuntimeError(
                    f"{_name(optimizer, param)} is a DTensor, of which a sum of gradients that is dropped leaves no "
                    "trace: take accumulation_steps=1; fully_shard's set_requires_gradient_sync(False) accumulates"
                )
        # Lazy and fake parameters have no memory.
        placed = [shards.local(param) if param.requires_grad and not is_lazy(param) else None for param in own]
        placed = [None if param is None or tensors.is_simulated(param) else param for param in placed]
        if any(overlap_levels(placed)):
            raise ValueError(
                "parameters of the optimizer share memory: in backward they would be updated in another order than by "
                "step(), and one before the other's gradient is complete"
            )
        self._refuse_ddp(common)
        try:
            for param in common:
                self._add(param)
        except BaseException:
            self._drop_hooks()
            raise
        # Makes GradScaler call step(), which can say what is wrong, instead of failing an assertion about nothing.
        self._scaling = vars(optimizer).get("_step_supports_amp_scaling")
        optimizer._step_supports_amp_scaling = True

    def remove(self) -> None:
        """Ends the release: from now on gradients stay and ``step()`` takes the step. Gradients summed up so far stay.

        A second call does nothing.
        """
        if self._removed:
            return
        self._removed = True
        self._drop_hooks()
        optimizer = self.optimizer()
        if optimizer is None:
            return
        optimizer.runtime.driver = None
        if self._scaling is None:
            del optimizer._step_supports_amp_scaling
        else:
            optimizer._step_supports_amp_scaling = self._scaling

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    @untraced
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """``optimizer.step()`` while gradients are released: applies those that backward has not."""
        optimizer = self.optimizer()
        assert optimizer is not None  # it is the caller
        scaled = [name for name in ("grad_scale", "found_inf") if name in vars(optimizer)]
        if scaled:
            for name in scaled:
                delattr(optimizer, name)  # as GradScaler would after the step
            raise RuntimeError(_NO_SCALER)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        own = _own_parameters(optimizer)
        self._renew_hooks(own)
        left = [param for param in own if param.grad is not None]
        if left:
            if self.accumulation_steps == 1:
                for param in left:
                    progress = self._progress_of(param)
                    if progress is not None and progress.window == self._window:
                        raise RuntimeError(
                            f"{_name(optimizer, param)} was updated in backward and has got another gradient "
                            "since: by hand, by a backward that was refused, or by DistributedDataParallel, which "
                            "cannot be used while gradients are released. optimizer.zero_grad() drops that gradient"
                        )
            step_all(optimizer)
            for param in left:
                if self._progress_of(param) is not None:
                    param.grad = None
        self._window += 1
        self._step_called = True
        return loss

    def zero_grad(self) -> None:
        """Gradients that wait for a step are in ``param.grad``: there is nothing else to drop."""

    def updated(self, param: Tensor) -> Tensor:
        """The tensor that steps update: the parameter, or its part on this rank."""
        return shards.local(param)

    def extend(self, params: Iterable[Tensor]) -> None:
        """Releases parameters that have come to the optimizer, if all it had before are released."""
        if self._released_all:
            for param in params:
                self._add(param)

    def _add(self, param: Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():  # lazy parameters refuse to be asked for anything
            self._add_hooks(param)

    def _add_hooks(self, param: Tensor) -> None:
        frozen = not param.requires_grad
        if frozen and (not param.is_floating_point() or param.is_inference()):
            return  # it can never require a gradient
        progress = self._progress[id(param)] = _Progress(param._cdata)
        # Hooks can be registered only where a gradient is required, and stay when it no longer is.
        if frozen:
            param.requires_grad_(True)
        try:
            _drop_dead_hooks(param)
            self._handles.append(param.register_post_accumulate_grad_hook(_Hook(self, progress)))
            self._attach(param, progress)
        finally:
            if frozen:
                param.requires_grad_(False)

    def _attach(self, param: Tensor, progress: _Progress) -> None:
        """Gives a parameter's current tensor what calls its hooks, and what tells when ``swap_tensors`` replaces it."""
        # A parameter that had hooks before it was swapped is called for none of them, until they are set once more.
        param._post_accumulate_grad_hooks = param._post_accumulate_grad_hooks
        if self.accumulation_steps > 1:
            self._handles.append(param.register_hook(self._before_accumulation(id(param), progress)))
        vars(param)[_SwapNotice.NAME] = _SwapNotice(self, id(param))

    def _drop_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        optimizer = self.optimizer()
        for param in () if optimizer is None else _own_parameters(optimizer):
            notice = vars(param).get(_SwapNotice.NAME)
            if isinstance(notice, _SwapNotice) and notice.is_of(self):
                del vars(param)[_SwapNotice.NAME]

    def _progress_of(self, param: Tensor) -> _Progress | None:
        """The record of a released parameter, or None. The hook tells it from another parameter of the same id."""
        progress = self._progress.get(id(param))
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        return (
            progress if any(isinstance(hook, _Hook) and hook.progress is progress for hook in hooks.values()) else None
        )

    def _renew_hooks(self, params: Iterable[Tensor]) -> None:
        """Registers the hooks of swapped parameters again: autograd keeps them with the tensor that was swapped out."""
        for param in params:
            progress = self._progress.get(id(param))
            if progress is None or progress.implementation == param._cdata or self._progress_of(param) is None:
                continue
            progress.implementation = param._cdata
            self._attach(param, progress)

    def swapped(self, key: int) -> None:
        """Called when the parameter of that id was swapped for another tensor, or deleted."""
        optimizer = self.optimizer()
        param = None if self._removed or optimizer is None else parameter_of_id(optimizer, key)
        if param is not None:
            self._renew_hooks([param])

    def _before_accumulation(self, key: int, progress: _Progress) -> Callable[[Tensor], None]:
        """A hook that begins the sum of gradients anew where the last one was dropped."""
        release = weakref.ref(self)  # whatever a tensor's hooks hold on to for good, lives for good

        @untraced
        def hook(_: Tensor) -> None:
            this = release()
            optimizer = None if this is None else this.optimizer()
            param = None if optimizer is None else parameter_of_id(optimizer, key)
            if param is not None and param.grad is None:
                progress.backwards = 0

        return hook

    def gradient_complete(self, optimizer: SignOptimizer, progress: _Progress, param: Tensor) -> None:
        """Called by autograd when it has added to ``param.grad`` all that this backward has for it."""
        if param.grad is None:
            raise RuntimeError(
                f"{_name(optimizer, param)} has lost its gradient to another hook: was it released for two optimizers?"
            )
        task = torch._C._current_graph_task_id()  # -1 where a compiled backward calls
        lock = optimizer.runtime.lock  # autograd has a thread for each device
        lock.refuse_nested()
        with lock.held:
            if task != self._task or task == -1:
                self._begin(optimizer, task)
            self._check_accumulation(optimizer, progress, param, task)
            progress.task, progress.nested = task, self._nested
            progress.backwards += 1
            if progress.backwards < self.accumulation_steps:
                return
            try:
                if not step_parameter(optimizer, param):
                    return  # no longer the optimizer's
            except BaseException:
                progress.refused = _identity(param.grad)
                raise
            param.grad = None
            progress.backwards = 0
            progress.window = self._window
            # Schedulers want to know that a step has been taken.
            optimizer._opt_called = True  # type: ignore[attr-defined]

    def _begin(self, optimizer: SignOptimizer, task: int) -> None:
        """Notes that a backward has begun, or goes on after one inside it."""
        self._nested = _inside_custom_backward()
        if not self._nested and self._running - {task}:
            # One has raised before its end. What it has updated stays so, and the loop goes on with another.
            self._running.clear()
            self._window += 1
        if task != -1 and task not in self._running:
            self._running.add(task)
            # Called only where a backward comes to its end.
            torch.autograd.Variable._execution_engine.queue_callback(functools.partial(self._running.discard, task))
        if not self._searched and _processes_may_exist():
            self._refuse_ddp([param for param in _own_parameters(optimizer) if self._progress_of(param) is not None])
            self._searched = True
        # A loop that never calls step() must have nothing left for it to do.
        optimizer.runtime.round += 1
        self._renew_hooks(_own_parameters(optimizer))
        self._others = not self._step_called and any(
            param.requires_grad and self._progress_of(param) is None for param in _own_parameters(optimizer)
        )
        self._task = task

    def _check_accumulation(self, optimizer: SignOptimizer, progress: _Progress, param: Tensor, task: int) -> None:
        """Raises where this gradient is another part of one that has been applied, before anything is written."""
        why = None
        refused, progress.refused = progress.refused, None
        if refused is not None and refused != _identity(param.grad) and refused[0] == _identity(param.grad)[0]:
            progress.refused = _identity(param.grad)
            why = (
                "a gradient that was added to one which the step before had refused, and left: call "
                "optimizer.zero_grad() after a backward that has raised"
            )
        elif progress.task == task != -1:
            why = (
                "its gradient in parts, of which the first has been taken for the whole: did its dtype or device "
                "change while the graph was built?"
            )
        elif self.accumulation_steps > 1:
            if self._nested:
                why = (
                    "a gradient from a backward inside another one, where parts of a gradient cannot be told from "
                    "gradients to be accumulated: with accumulation_steps > 1 use checkpoint(..., use_reentrant=False)"
                )
        elif progress.window == self._window:
            if self._nested or progress.nested:
                why = (
                    f"{_SECOND}, and one of them came from a backward inside another. In reentrant checkpointing a "
                    "parameter used in several segments gets its gradient in parts: use checkpoint(..., "
                    "use_reentrant=False). If none is used in several, call optimizer.step() after each backward()"
                )
            elif self._step_called or self._others:
                why = (
                    f"{_SECOND}. To accumulate over N backwards, release with accumulation_steps=N; otherwise call "
                    "optimizer.step() after each backward()"
                )
                if not self._step_called:
                    why += ", which updates the parameters that are not released"
        if why is not None:
            raise RuntimeError(f"{_name(optimizer, param)} got {why}")

    def _refuse_ddp(self, params: list[Tensor]) -> None:
        """Raises if a DistributedDataParallel has these parameters, which do not show it themselves."""
        if not _processes_may_exist():
            return
        ours = {id(param) for param in params}
        for thing in gc.get_objects():
            if issubclass(type(thing), DistributedDataParallel):
                if any(id(param) in ours for param in thing.parameters()):
                    raise RuntimeError(_NO_DDP)


def _identity(grad: Tensor | None) -> tuple[int, int]:
    """A gradient and what has been written to it: adding to one changes the second number."""
    return (0, 0) if grad is None else (grad._cdata, grad._version)


_SECOND = "a second gradient since the last optimizer.step(), but the first was applied and freed in backward"

_NO_DDP = (
    "gradients of a model in DistributedDataParallel cannot be released: it averages them over processes after the "
    "point where they would be applied, so each process would apply its own and the models would drift apart"
)
_NO_FSDP = (
    "gradients of a model in FullyShardedDataParallel cannot be released: they are averaged over "
    "processes after the point where they would be applied"
)


class _Hook:
    """Called by autograd after it has accumulated a parameter's gradient."""

    def __init__(self, release: GradientRelease, progress: _Progress) -> None:
        self._release = weakref.ref(release)
        self.progress = progress

    def optimizer(self) -> SignOptimizer | None:
        release = self._release()
        return None if release is None else release.optimizer()

    @untraced
    def __call__(self, param: Tensor) -> None:
        release, optimizer = self._release(), self.optimizer()
        if release is not None and optimizer is not None:
            release.gradient_complete(optimizer, self.progress, param)
            return
        warnings.warn(
            "the optimizer for which gradients were released no longer exists, so parameters are not updated: keep the "
            "optimizer, or call remove() of the release before you drop it",
            RuntimeWarning,
            stacklevel=2,
        )


class _SwapNotice:
    """Tells a release that one of its parameters has been swapped (``torch.utils.swap_tensors``).

    Autograd's hooks stay with the old tensor then, so nothing would be called any more. A parameter's attributes go
    with the old tensor, too, and end with it: this is one of them.
    """

    NAME = "_released_by"

    def __init__(self, release: GradientRelease, key: int) -> None:
        self._release = weakref.ref(release)
        self._key = key

    def is_of(self, release: GradientRelease) -> bool:
        return self._release() is release

    def __del__(self) -> None:
        release = self._release()
        if release is not None:
            release.swapped(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        """A parameter that is pickled takes nothing of its release along."""
        return set, ()


def _drop_dead_hooks(param: Tensor) -> None:
    """Removes hooks of optimizers that were dropped without remove(): the new optimizer takes their place."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in hooks.items() if isinstance(hook, _Hook) and hook.optimizer() is None]:
        del hooks[key]


def _parameters_of(what: Any) -> list[Tensor]:
    """The parameters of a module, or of anything an optimizer can be made with."""
    if isinstance(what, nn.Module):
        return list(what.parameters())
    expected = "must be a module or an iterable of parameters, (name, parameter) pairs or parameter groups"
    if isinstance(what, dict):
        what = [what]
    if isinstance(what, (Tensor, str)) or not isinstance(what, Iterable):
        raise TypeError(f"model_or_params is a {type(what).__name__}: {expected}")
    params: list[Tensor] = []
    for item in what:
        if isinstance(item, dict) and "params" in item:
            of_group = item["params"]
            params += [of_group] if isinstance(of_group, Tensor) else _parameters_of(of_group)
            continue
        if isinstance(item, tuple) and len(item) == 2:
            item = item[1]
        if not isinstance(item, Tensor):
            raise TypeError(f"model_or_params holds a {type(item).__name__}: {expected}")
        params.append(item)
    return params


def _refuse_wrapper(name: str, module: nn.Module) -> None:
    """Raises for modules that exchange gradients between processes after a parameter's hooks have run."""
    if isinstance(module, DistributedDataParallel):
        raise RuntimeError(_NO_DDP)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and not there means not used
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise RuntimeError(_NO_FSDP)


def _processes_may_exist() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_CUSTOM_BACKWARDS = {
    method.__code__
    for method in (getattr(BackwardCFunction, name, None) for name in ("apply", "apply_boxed"))
    if method is not None
}


def _inside_custom_backward() -> bool:
    """Whether this thread is in the backward of an autograd.Function, whose own backward() has led here.

    The numbers of two backwards do not tell whether one runs inside the other; the stack does, on a device's thread
    as well. FSDP2 reduces gradients, and calls the hooks of its parameters, in such a function that runs no backward.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code in _CUSTOM_BACKWARDS and not _is_of_fsdp2(frame.f_locals.get("self")):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _is_of_fsdp2(function: Any) -> bool:
    """Whether this is the backward of a function that FSDP2 puts behind its modules."""
    forward = getattr(type(function), "_forward_cls", None)
    return getattr(forward, "__module__", "").startswith("torch.distributed.fsdp._fully_shard")


def _own_parameters(optimizer: SignOptimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _name(optimizer: SignOptimizer, param: Tensor | None) -> str:
    """What errors call a parameter."""
    for index, group in enumerate(optimizer.param_groups):
        for i, other in enumerate(group["params"]):
            if other is param:
                return label(group, index, i)
    return "a parameter"
