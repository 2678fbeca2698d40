"""What a backend is: it takes a bucket of tensors and scalars, and updates them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core import tensors
from ..core.native import compiled as _C

if TYPE_CHECKING:
    from .bucket import Bucket

ScalarSet = tuple[float, ...]
#: Updates a bucket on a device whose table has begun a step, given the sets of scalars that its tensors name by index.
DeviceLaunch = Callable[[Sequence[ScalarSet]], None]


class HostLaunch:
    """A launch whose writes are operations of one commit, so that a step is taken as a whole or not at all."""

    def operations(self, scalar_sets: Sequence[ScalarSet]) -> list[Any]:
        """What :func:`commit` is to do for a bucket whose table has begun a step. Nothing has been written before."""
        raise NotImplementedError

    def __call__(self, scalar_sets: Sequence[ScalarSet]) -> None:
        commit(self.operations(scalar_sets))


Launch = DeviceLaunch | HostLaunch


def commit(
    operations: list[Any],
    tables: Sequence[Any] = (),
    states: Sequence[tuple[Any, ...]] = (),
    written: Any = None,
) -> None:
    """Writes a step, all of it in one call into C++, in which no signal handler runs.

    Args:
        operations: of :class:`HostLaunch`, in order: CPU launches, and builtin functions of torch with arguments.
        tables: those whose tensors count the step.
        states: (optimizer's state, parameter, its state or None, entries to put in, names to take out); for what a
            group keeps of the step, the group stands for a parameter's state.
        written: the parameters that are written, or the compiled reader that has read them, or None.

    Raises:
        TypeError, ValueError: a tensor to be copied has no memory; nothing has been written.
    """
    copies = [operation for operation in operations if type(operation) is tuple]
    for _, targets, results in copies:
        for tensor in (*targets, *results):
            # A mode of the user's, FakeTensorMode for example, may have made it.
            tensors.allocated("what a step copies", tensor)
    # Modes and subclasses would run Python code between two of the writes. Made last: they work as soon as they exist.
    guards = [torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch()] if copies else []
    _C.commit(
        operations, list(tables), list(states), [] if written is None else written, torch._C._increment_version, guards
    )


@runtime_checkable
class StreamedLaunch(Protocol):
    """A launch whose kernels run on a stream of their device, after it has returned."""

    def wait(self) -> None: ...
    def __call__(self, scalar_sets: Sequence[ScalarSet]) -> None: ...


class Backend(Protocol):
    """One way to update tensors."""

    name: str
    splits_formats: bool  # whether a launch takes one combination of dtypes and storage forms only

    def unusable(self, device: torch.device | None) -> str | None:
        """Why tensors on ``device`` (None: any) cannot be served here, or None when they can."""

    def prepare(self, bucket: Bucket, grad: Callable[[int], Tensor]) -> Launch:
        """Does what can be done before the first step; ``grad`` gives the tensor of a gradient, by ``Entry.index``."""


class DeviceKernels(Protocol):
    """The kernels of a bucket whose steps begin on its device, each started on the stream that is current there.

    Attributes:
        buffers: what they use beside their arguments and what belongs to the user.
    """

    buffers: tuple[Tensor, ...]

    def norm(self, grads: Tensor, totals: Tensor, places: Tensor) -> None:
        """Leaves the sum of squares of each gradient in ``totals``, float64.

        Args:
            grads: int64, address of each tensor's gradient, 0 where there is none: nothing is written then.
            totals: float64.
            places: int32, where each tensor's is.
        """

    def begin(
        self, entries: Tensor, operations: Tensor, results: Tensor, values: Tensor, control: Tensor, grads: Tensor
    ) -> None:
        """Makes a step's data of programs, as triton_kernels/begin.py says."""

    def update(self) -> None:
        """Takes the step that has begun."""


@runtime_checkable
class DeviceBackend(Backend, Protocol):
    """A backend whose steps can begin on the device."""

    def device_step(self, bucket: Bucket) -> DeviceKernels: ...
