"""State and step on the CPU, for parameters on a GPU: gradients go down while backward runs, parameters come back.

A step is the optimizer's own, on copies of the parameters in host memory: the same rule, state and random bits, so the
same bits. What is here is what crosses the bus, when, and what must not be taken for what it was.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol, cast

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy

from ..backends.device import is_current, refuse_capture
from ..core import checks, memory_order, shards, tensors
from ..core.dynamo import untraced
from ..core.formats import outside_inference_mode
from ..core.rule import rule_of
from ..engine.overlap import overlap_levels
from ..optimizers.base import SignOptimizer
from ..optimizers.groups import label, posing_as
from ..optimizers.stepping import refuse_sums, step_all

#: Host memory is taken in pieces of so many bytes at most, unless a tensor is larger: torch rounds what it pins up to a
#: power of two.
PIECE = 1 << 30
#: Tensors begin at multiples of so many bytes, a cache line.
ALIGNMENT = 64


def offload(
    optimizer: SignOptimizer,
    *,
    release: bool = False,
    overlap: bool = True,
    device: str | torch.device | None = None,
) -> Offload:
    """Moves an optimizer's state, and its steps, to the CPU, for parameters on a GPU.

    The loop stays as it is, and parameters and state get the bits of the same steps taken on the CPU::

        offload(optimizer)
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss_function(model(inputs), targets).backward()  # gradients go down meanwhile
            optimizer.step()  # on the CPU; parameters come up
            scheduler.step()

    Each gradient is copied to pinned host memory, on a stream of its own, as soon as backward has accumulated it.
    ``step()`` waits for the last of them, runs the CPU kernels over all parameters at once, and starts the copies back,
    for which the current stream waits and the host does not. On the host are then a copy of each parameter that is
    trained, a gradient's memory for each, and ``optimizer.state``; on the GPU are parameters and gradients alone.

    **What crosses the bus** in a step is each gradient in its own dtype, down, and each parameter in its own, up: 2
    bytes and 2 for bf16, whatever is kept on the host. A gradient that something has changed after backward (clipping,
    unscaling) goes down in ``step()``, and from the next backward on it goes there alone; of gradients that several
    backwards accumulate, only the last sum goes down, from the second step on.

    The optimizer is used as before: groups, schedulers, closures, ``zero_grad()``, ``state_dict()``, ``save_state()``,
    loading, statistics. Parameters that are on the CPU already are stepped where they are. What another optimizer has
    saved loads, and the other way round. A parameter that is set from outside wins over its copy on the host. So does a
    gradient. Both are noticed by torch's version of a tensor, which writes through ``.data`` and by kernels of others
    do not change: of parameters tell :meth:`Offload.refresh`, of gradients pass ``overlap=False``.

    Where ``torch.distributed`` runs, gradients go down in ``step()``, as ``DistributedDataParallel`` averages them
    after the hooks. For sharded parameters there is ``fully_shard``'s ``CPUOffloadPolicy``.

    Args:
        optimizer: one of this package, before or after its first step. Its ``backend`` is the GPU's choice: "cuda" and
            "triton" become "cpu" here.
        release: whether a gradient is dropped on the GPU, once it is copied. ``param.grad`` is None after backward
            then, so that clipping finds nothing to clip. The gradients of further backwards are added up on the host,
            for which each of these waits. ``optimizer.zero_grad()`` drops what is on the host, ``model.zero_grad()``
            does not.
        overlap: whether gradients go down while backward runs; otherwise all do in ``step()``.
        device: the type of the devices whose parameters are offloaded, where they are now. None: all but "cpu". With
            "cpu" parameters on the CPU are copied just so, which tries a program without a GPU.

    Returns:
        The offload, which ends with its ``remove()`` or, used as a context manager, with its block.

    Raises:
        TypeError: arguments of other kinds, or a parameter in parts (DTensor, flat parameters of FSDP).
        ValueError: ``device`` is no type of a device, no trainable parameter is on such a device, or some share memory.
        RuntimeError: the optimizer is offloaded already or its gradients are released, or ``release`` on several
            processes.

    ``max_grad_norm`` of the optimizer clips on the host, with ``release`` too; ``GradScaler`` needs gradients on the
    device, and a step with ``release`` refuses it.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> optimizer = SignAdamPP(model.parameters(), state_dtype="int2")
        >>> offloaded = offload(optimizer, device="cpu")  # without the argument where the model is on a GPU
        >>> model(torch.randn(4, 10)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.weight]["exp_avg"].device
        device(type='cpu')
    """
    if not isinstance(optimizer, SignOptimizer):
        raise TypeError(
            f"optimizer is a {checks.class_name(optimizer)}: offload serves the optimizers of signadam_ext, whose "
            "steps have CPU kernels; from_optimizer puts one of them in its place"
        )
    checks.flag("release", release)
    checks.flag("overlap", overlap)
    kind = _kind_of(device)
    # A trainer may have wrapped it in an object that poses as its class.
    optimizer = cast(SignOptimizer, optimizer.runtime.owner() or optimizer)
    if optimizer.runtime.driver is not None:
        driven = "offloaded" if isinstance(optimizer.runtime.driver, Offload) else "stepped in backward"
        raise RuntimeError(f"this optimizer is {driven} already: call remove() of what has done that first")
    refuse_sums(optimizer, "offload")
    made = Offload(optimizer, release, overlap, kind)
    optimizer.runtime.driver = made
    optimizer.runtime.forget_plans()
    return made


def _kind_of(device: object) -> str | None:
    """The type of device that an argument names.

    Raises:
        TypeError, ValueError: it names none, or one device of several.
    """
    if device is None:
        return None
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device={checks.shown(device)}: must be the type of a device, 'cuda' for example, or None")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={checks.shown(device)}: must be the type of a device, 'cuda' for example") from error
    if found.index is not None:
        raise ValueError(f"device={str(found)!r}: must be the type of a device without a number, {found.type!r}")
    return found.type


class Lane(Protocol):
    """The way between the host and one device: copies in order, beside what the device computes."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Starts a copy of what ``source`` is once all that its device has been asked for is done."""

    def settle(self) -> None:
        """The host waits for all copies."""

    def join(self) -> None:
        """The device's current stream waits for all copies."""


class StreamLane:
    """Copies on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: Tensor, source: Tensor) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            for tensor in (target, source):
                if tensor.device.type == "cuda":
                    # Its user may drop it before the copy has run.
                    tensor.record_stream(self._stream)

    def settle(self) -> None:
        self._stream.synchronize()

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._stream)


class DirectLane:
    """Copies at once, between host and devices that are no CUDA devices."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def settle(self) -> None:
        pass

    def join(self) -> None:
        pass


def lane_of(device: torch.device) -> Lane:
    """A new lane to a device."""
    if device.type != "cuda":
        return DirectLane()
    with is_current(device):
        return StreamLane(device)


@dataclass(slots=True, eq=False)
class _HostParam:
    """A parameter of a device, and what the host has of it.

    Attributes:
        param: the parameter.
        copy: what steps on the host update.
        gradients: where its gradients go.
        seen: the parameter when the copy was equal to it.
        copy_version: the copy's version then.
        arrived: the gradient that the last backward has left, or None.
        held: the gradient that ``gradients`` holds, or None.
        is_pending: whether ``gradients`` holds one that has been dropped on the device.
        is_hooked: whether autograd says when its gradient is complete, which it does of trainable parameters only.
        backwards: how many have brought a gradient since the last step.
        awaited: with which of them the gradient goes down; 0 where none does.
    """

    param: Tensor
    copy: Tensor
    gradients: Tensor
    seen: _Seen | None = None
    copy_version: int = 0
    arrived: _Seen | None = None
    held: _Seen | None = None
    is_pending: bool = False
    is_hooked: bool = False
    backwards: int = 0
    awaited: int = 1

    def fits(self, param: Tensor) -> bool:
        """Whether the copy has the parameter's dtype and memory order, which both may have changed."""
        return (
            self.param is param
            and self.copy.dtype == param.dtype
            and self.copy.shape == param.shape
            and (
                self.copy.stride() == param.stride()
                or memory_order.same_strides(self.copy, memory_order.strides_of(param))
            )
        )


class _Seen:
    """What a tensor was: its object or its storage, its place there and its version.

    Both are held weakly, and so that nothing else can have their address while this exists.
    """

    __slots__ = ("_storage", "_tensor", "_version")

    def __init__(self, tensor: Tensor, *, by_object: bool) -> None:
        self._tensor = weakref.ref(tensor) if by_object else None
        self._storage = (StorageWeakRef(tensor.untyped_storage()), tensor.storage_offset())
        self._version = _version_of(tensor)

    def is_still(self, tensor: Tensor) -> bool:
        """Whether this is the tensor as it was, as far as torch knows."""
        storage, offset = self._storage
        return (
            (self._tensor is None or self._tensor() is tensor)
            and tensor.untyped_storage()._cdata == storage.cdata
            and tensor.storage_offset() == offset
            and self._version is not None
            and _version_of(tensor) == self._version
        )


def _version_of(tensor: Tensor) -> int | None:
    """How often it has been written; None for inference tensors, which do not count."""
    return None if tensor.is_inference() else tensor._version


class Offload:
    """What :func:`offload` returns; also a context manager, which removes it at the end.

    Made only by that function. Copies and pickles of the optimizer are not offloaded, and have their state on the CPU:
    offload them as well. This object itself can be neither copied nor pickled.

    Example:
        >>> model = torch.nn.Linear(10, 1)
        >>> with offload(SignAdamPP(model.parameters()), device="cpu") as offloaded:
        ...     offloaded.refresh()  # after a write that torch does not notice
    """

    def __init__(self, optimizer: SignOptimizer, release: bool, overlap: bool, device: str | None) -> None:
        self.release, self.overlap, self.device = release, overlap, device
        # It is held by the optimizer, and by the hooks of parameters weakly.
        self.optimizer = weakref.ref(optimizer)
        self._lock = threading.RLock()
        self._host_params: dict[int, _HostParam] = {}
        self._lanes: dict[torch.device, Lane] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._removed = False
        if release and _several_processes():
            raise RuntimeError(_NO_RELEASE)
        found = [entry for entry in self._own(optimizer) if self._is_served(entry[0]) and entry[0].requires_grad]
        if not found:
            where = "another device than the CPU" if device is None else f"a device of type {device!r}"
            raise ValueError(
                f"no trainable parameter of the optimizer is on {where}, from where it would be offloaded to the CPU: "
                "there is nothing to offload"
            )
        try:
            self._add(optimizer, found)
        except BaseException:
            self._drop_hooks()
            raise
        # Hooks of an optimizer that is gone would be called for nothing.
        weakref.finalize(self, _remove_all, self._handles).atexit = False

    # What a user calls

    def refresh(self) -> None:
        """Makes the next step take all parameters from the device again.

        To be called after writes that torch does not notice: through ``param.data``, or by another library's kernels.
        """
        with self._lock:
            for host in self._host_params.values():
                host.seen = None

    def remove(self) -> None:
        """Ends the offload: state goes to the parameters' devices, and steps run there again.

        Gradients that wait on the host for a step go back to their parameters. A second call does nothing.
        """
        if self._removed:
            return
        optimizer = self.optimizer()
        with self._lock, outside_inference_mode(), torch.no_grad():
            self._settle()
            if optimizer is not None:
                moved = {}
                for host in self._host_params.values():
                    own = optimizer.state.get(host.param)
                    if own:
                        moved[host.param] = _moved(own, host.param.device)
                for host in self._host_params.values():
                    if host.is_pending:
                        self._give_back(host)
                for param, own in moved.items():
                    optimizer.state[param] = own
                optimizer.runtime.driver = None
                optimizer.runtime.forget_plans()
            self._removed = True
            self._drop_hooks()
            self._host_params.clear()

    def __enter__(self) -> Offload:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an Offload is about the parameters of this process, and can be neither copied nor pickled: copy the "
            "optimizer, and offload the copy"
        )

    # What the optimizer calls

    @untraced
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """``optimizer.step()`` while it is offloaded."""
        optimizer = self.optimizer()
        assert optimizer is not None  # it is the caller
        scaled = [name for name in ("grad_scale", "found_inf") if name in vars(optimizer)]
        if scaled and self.release:
            for name in scaled:
                delattr(optimizer, name)  # as GradScaler would after the step
            raise RuntimeError(_NO_SCALER)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        optimizer.runtime.lock.refuse_nested()
        with self._lock:
            self._step(optimizer)
        return loss

    def zero_grad(self) -> None:
        """Drops the gradients that are on the host alone."""
        with self._lock:
            for host in self._host_params.values():
                host.is_pending = False
                host.held = None

    def extend(self, params: Iterable[Tensor]) -> None:
        """Takes in parameters of a new group. What cannot be served is refused by the step, which names it."""
        optimizer = self.optimizer()
        assert optimizer is not None
        added = {id(param) for param in params}
        found = [entry for entry in self._own(optimizer) if id(entry[0]) in added]
        with contextlib.suppress(TypeError, ValueError):
            self._add(optimizer, [entry for entry in found if self._is_served(entry[0]) and entry[0].requires_grad])

    def updated(self, param: Tensor) -> Tensor:
        """The tensor that steps update for a parameter, beside which its state lies."""
        host = self._host_params.get(id(param))
        if host is None or not host.fits(param) or not self._is_served(param):
            return shards.local(param)
        with outside_inference_mode(), torch.no_grad():
            self._refresh(host)
            self._lane(param.device).settle()
        return host.copy

    # Parameters

    @staticmethod
    def _own(optimizer: SignOptimizer) -> list[tuple[Tensor, str]]:
        """Each parameter of the optimizer, and what errors call it."""
        return [
            (param, label(group, index, i))
            for index, group in enumerate(optimizer.param_groups)
            for i, param in enumerate(group["params"])
        ]

    def _is_served(self, param: Tensor) -> bool:
        """Whether the parameter is on a device whose parameters are offloaded, and has its memory there by now."""
        kind = param.device.type
        is_elsewhere = kind != "cpu" if self.device is None else kind == self.device
        return is_elsewhere and kind != "meta" and not is_lazy(param)

    def _lane(self, device: torch.device) -> Lane:
        lane = self._lanes.get(device)
        if lane is None:
            lane = self._lanes[device] = lane_of(device)
        return lane

    def _settle(self) -> None:
        for lane in self._lanes.values():
            lane.settle()

    def _add(self, optimizer: SignOptimizer, found: Sequence[tuple[Tensor, str]]) -> None:
        """Makes what the host has of parameters, copies them down, and moves their state. All of them, or none.

        Raises:
            TypeError, ValueError: a parameter that cannot be offloaded.
        """
        for param, name in found:
            if shards.is_sharded(param) or shards.is_flattened(param):
                raise TypeError(
                    f"{name} lies in parts on several processes, whose own way to offload it is "
                    "CPUOffloadPolicy of fully_shard, or CPUOffload of FullyShardedDataParallel"
                )
            tensors.parameter(name, param)
        added = {id(param) for param, _ in found}
        others = [host.param for key, host in self._host_params.items() if key not in added]
        if any(overlap_levels([*others, *(param for param, _ in found)])):
            raise ValueError(
                "parameters of the optimizer share memory, and would have a copy each on the host, of which the last "
                "to come up would win"
            )
        with outside_inference_mode(), torch.no_grad():
            layouts = [(param.shape, memory_order.strides_of(param), param.dtype) for param, _ in found]
            pinned = {param.device.type for param, _ in found} == {"cuda"}
            memory = host_tensors([*layouts, *layouts], pinned)
            made = [
                _HostParam(param, copy, gradients)
                for (param, _), copy, gradients in zip(found, memory, memory[len(found) :], strict=False)
            ]
            cpu = torch.device("cpu")
            moved = {param: _moved(own, cpu) for param, _ in found if (own := optimizer.state.get(param))}
            for host in made:
                self._refresh(host)
                known = self._host_params.get(id(host.param))
                if known is not None and known.param is host.param:
                    self._succeed(host, known)
                self._hook(host)
                self._host_params[id(host.param)] = host
            for param, own in moved.items():
                optimizer.state[param] = own

    def _hook(self, host: _HostParam) -> None:
        param = host.param
        if not host.is_hooked and param.requires_grad and param.is_leaf:
            self._handles.append(param.register_post_accumulate_grad_hook(_Hook(self)))
            host.is_hooked = True

    def _succeed(self, host: _HostParam, known: _HostParam) -> None:
        """Hands on what was known of a parameter, whose dtype or memory order has changed."""
        host.is_hooked = known.is_hooked
        if known.is_pending and known.gradients.shape == host.gradients.shape:
            self._settle()
            host.gradients.copy_(known.gradients)
            host.is_pending = True

    def _drop_hooks(self) -> None:
        _remove_all(self._handles)

    def _refresh(self, host: _HostParam) -> None:
        """Makes parameter and copy equal, on the way to which a copy is started."""
        param, lane = host.param, self._lane(host.param.device)
        if host.seen is not None and host.seen.is_still(param):
            if host.copy._version == host.copy_version:
                return
            lane.copy(param.detach(), host.copy)  # a step was interrupted after it had been taken
        else:
            lane.copy(host.copy, param.detach())
        host.seen, host.copy_version = _Seen(param, by_object=False), host.copy._version

    # Gradients

    def gradient_complete(self, param: Tensor) -> None:
        """Called by autograd when it has added to ``param.grad`` all that this backward has for it."""
        optimizer, host = self.optimizer(), self._host_params.get(id(param))
        if optimizer is None or host is None or not self._is_served(param) or not host.fits(param):
            return
        optimizer.runtime.lock.refuse_nested()
        with self._lock, outside_inference_mode(), torch.no_grad():
            grad = param.grad
            if grad is None:
                if self.release:
                    raise RuntimeError(
                        "a parameter has lost its gradient to another hook: was it offloaded with release=True for two "
                        "optimizers?"
                    )
                return
            host.backwards += 1
            if grad.layout != torch.strided:
                return  # the step refuses it
            is_captured = grad.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
            if is_captured and not self.release:
                return  # a replay brings other gradients there, and calls no hook
            if self.release:
                refuse_capture((grad.device,))
                if _several_processes():
                    raise RuntimeError(_NO_RELEASE)
                self._take(host, grad)
                param.grad = None
                return
            host.arrived = _Seen(grad, by_object=True)
            is_due = host.awaited and host.backwards >= host.awaited
            # DistributedDataParallel has not averaged it yet.
            if self.overlap and is_due and not _several_processes():
                self._bring(host, grad)
                host.held = host.arrived

    def _take(self, host: _HostParam, grad: Tensor) -> None:
        """Moves a gradient to the host, or adds it to the one that waits there."""
        if not host.is_pending:
            self._bring(host, grad)
            host.is_pending = True
            return
        self._lane(grad.device).settle()
        # As autograd adds up on the device: in the gradient's dtype, one after the other.
        host.gradients.add_(grad.detach().to("cpu"))

    def _bring(self, host: _HostParam, grad: Tensor) -> None:
        """Starts the copy of a gradient to the host."""
        if host.gradients.dtype != grad.dtype:
            layout = (grad.shape, host.copy.stride(), grad.dtype)
            (host.gradients,) = host_tensors([layout], grad.device.type == "cuda")
        self._lane(grad.device).copy(host.gradients, grad.detach())

    def _give_back(self, host: _HostParam) -> None:
        """Makes the gradient that waits on the host the parameter's, or adds it to that."""
        self._settle()
        grad = host.gradients.to(host.param.device, copy=True)
        host.param.grad = grad if host.param.grad is None else host.param.grad.add_(grad)
        host.is_pending = False

    # The step

    def _step(self, optimizer: SignOptimizer) -> None:
        refuse_capture(self._lanes)
        with outside_inference_mode(), torch.no_grad():
            taken = self._gathered(optimizer)
            self._settle()
        groups, state, made = self._groups(optimizer, taken)
        try:
            for host in taken.values():
                tensors.give_gradient(host.copy, host.gradients)
            step_all(posing_as(optimizer, param_groups=groups, state=state))
            for host in taken.values():
                self._note_taken(host)
        finally:
            # What the step's commit has written, whatever was raised since.
            for own, group in zip(optimizer.param_groups, groups, strict=True):
                own["largest_lr"] = group["largest_lr"]
            for host in taken.values():
                host.copy.grad = None
                vars(host.copy).clear()
            for param in made:
                if not optimizer.state[param]:
                    del optimizer.state[param]
            with outside_inference_mode(), torch.no_grad():
                for host in taken.values():
                    self._refresh(host)
                for lane in self._lanes.values():
                    lane.join()

    def _gathered(self, optimizer: SignOptimizer) -> dict[int, _HostParam]:
        """Brings down what this step reads and is not there yet: of each parameter with a gradient, by its id.

        Raises:
            TypeError, ValueError: a parameter or a gradient that cannot be served.
        """
        own = self._own(optimizer)
        ids = {id(param) for param, _ in own}
        self._host_params = {key: host for key, host in self._host_params.items() if key in ids}
        present, missing = [], []
        for param, name in own:
            host = self._host_params.get(id(param))
            if not self._is_served(param):
                if host is not None and host.is_pending:
                    self._give_back(host)  # it has been moved to the CPU since
                continue
            if param.grad is None and (host is None or not host.is_pending):
                continue
            present.append((param, name))
            if host is None or not host.fits(param):
                missing.append((param, name))
        for param, name in present:
            tensors.parameter(name, param)
            if param.grad is not None:
                tensors.gradient(name, param.grad, param)
        if missing:
            self._add(optimizer, missing)
        for host in self._host_params.values():
            if host.copy._version != host.copy_version and self._is_served(host.param):
                self._refresh(host)  # a step that was interrupted after it had been taken
        taken = {}
        for param, _ in present:
            host = taken[id(param)] = self._host_params[id(param)]
            self._refresh(host)
            self._hook(host)
            grad = param.grad
            if grad is None:
                continue
            if self.release:
                self._take(host, grad)
                param.grad = None
            elif host.held is None or not host.held.is_still(grad):
                self._bring(host, grad)
                host.held = _Seen(grad, by_object=True)
        return taken

    def _groups(
        self, optimizer: SignOptimizer, taken: dict[int, _HostParam]
    ) -> tuple[list[dict[str, Any]], dict[Tensor, Any], list[Tensor]]:
        """Groups and state as the step on the host sees them, and the parameters whose state is new, and empty."""
        groups, made = [], []
        state: dict[Tensor, Any] = {}
        for group in optimizer.param_groups:
            backend = "cpu" if group["backend"] in ("cuda", "triton") else group["backend"]
            stepped = []
            reads_variance = rule_of(type(optimizer), group).reads_variance
            for param in group["params"]:
                host = self._host_params.get(id(param))
                copy = param if host is None or not self._is_served(param) else host.copy
                stepped.append(copy)
                own = optimizer.state.get(param)
                if own is None and (id(param) in taken or (copy is param and param.grad is not None)):
                    own = optimizer.state[param] = {}
                    made.append(param)
                if own is not None:
                    # One dictionary for both, so that what the step puts into it is the optimizer's at once.
                    state[copy] = own
                if reads_variance and id(param) in taken:
                    variance = getattr(param, "grad_variance", None)
                    if isinstance(variance, Tensor):
                        variance = variance.detach().to("cpu")
                    vars(copy)["grad_variance"] = variance
            groups.append({**group, "params": stepped, "backend": backend})
        return groups, state, made

    @staticmethod
    def _note_taken(host: _HostParam) -> None:
        """A step is over: its gradient is no longer needed, and has told when the next one may go down."""
        grad = host.param.grad
        if host.arrived is not None and grad is not None:
            # One that is changed between backward and step need not go down twice.
            host.awaited = host.backwards if host.arrived.is_still(grad) else 0
        host.backwards, host.is_pending = 0, False
        host.arrived = host.held = None


def host_tensors(layouts: Sequence[tuple[torch.Size, Sequence[int], torch.dtype]], pinned: bool) -> list[Tensor]:
    """Host tensors of these shapes, strides and dtypes, as parts of a few large pieces of memory.

    Args:
        layouts: of each tensor, which has no gaps.
        pinned: whether a GPU copies from and to them while the host does something else.
    """
    sizes = [-(shape.numel() * dtype.itemsize) // ALIGNMENT * -ALIGNMENT for shape, _, dtype in layouts]
    pieces: list[int] = []
    places: list[tuple[int, int]] = []
    for size in sizes:
        if not pieces or pieces[-1] + size > PIECE:
            pieces.append(0)
        places.append((len(pieces) - 1, pieces[-1]))
        pieces[-1] += size
    memory = [torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned) for size in pieces]
    return [
        torch.empty(0, dtype=dtype, device="cpu").set_(
            memory[piece].untyped_storage(), begin // dtype.itemsize, shape, tuple(strides)
        )
        for (piece, begin), (shape, strides, dtype) in zip(places, layouts, strict=True)
    ]


class _Hook:
    """Called by autograd after it has accumulated a parameter's gradient."""

    def __init__(self, offload: Offload) -> None:
        self._offload = weakref.ref(offload)

    @untraced
    def __call__(self, param: Tensor) -> None:
        offload = self._offload()
        if offload is not None:
            offload.gradient_complete(param)


def _remove_all(handles: list[torch.utils.hooks.RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
    handles.clear()


def _moved(state: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A parameter's state with its tensors on a device; the number of steps stays on the CPU."""
    return {
        name: value.to(device) if isinstance(value, Tensor) and name != "step" else value
        for name, value in state.items()
    }


def _several_processes() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_NO_RELEASE = (
    "release=True drops a gradient as soon as this process has it, before DistributedDataParallel averages it over the "
    "processes: take release=False"
)
_NO_SCALER = (
    "GradScaler looks for the gradients on the device, where release=True leaves none: take release=False, or train in "
    "bfloat16, which needs no scaler"
)
