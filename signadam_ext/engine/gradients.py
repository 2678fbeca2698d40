"""Reads what may have changed since a plan was made: in C++ through torch's C shim, otherwise here, as strictly.

A reader owns tensors from ``read`` to ``release`` only. Between two steps it knows addresses and layouts, which it
compares with those of whatever the groups and the state hold then.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import memory_order, shards, tensors
from ..core.formats import outside_inference_mode
from ..core.native import compiled as _C
from ..core.shards import Sharding

StateEntries = Sequence[tuple[str, Tensor]]


class GradientReader(Protocol):
    """What a plan asks of its reader. Parameters are known by ``index``, in the plan's order."""

    @property
    def source(self) -> Any:
        """What a table takes gradient addresses from."""

    def watch(
        self,
        group: int,
        param: Tensor | None,
        grad_strides: Sequence[int],
        grad_dtype: torch.dtype,
        state: StateEntries,
        sharding: Sharding | None = None,
        counts_there: bool = False,
    ) -> None:
        """Notes a parameter; None where the plan knows no gradient and no state of it.

        Of one with a sharding, all else is about its part on this rank. With ``counts_there`` only the device reads the
        last entry, the number of steps, and the plan holds only as long as torch has not written to it.
        """

    def read(self, param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any] | None) -> list[int] | None:
        """Indices of gradients that cannot be read where they lie; None where the plan no longer holds.

        ``state`` is the optimizer's, or None while what the step uses is not in it yet.
        """

    def unchanged(self) -> bool:
        """Whether all that ``read`` has found is still so, after code of the user's has run."""

    def replace(self, index: int, address: int) -> None:
        """Gives a gradient another address, of a copy that can be read."""

    def written(self) -> Any:
        """The parameters with a gradient and their state, as :func:`signadam_ext.backends.commit` takes them."""

    def held(self, index: int) -> tuple[Any, ...]:
        """The parameter, its gradient or None, and the state entries watched, while a step is under way."""

    def addresses(self) -> list[int]:
        """Address of each gradient, 0 where a parameter has none."""

    def release(self) -> None:
        """The step is over: nothing is owned any more."""


@functools.cache
def _sample(dtype: torch.dtype) -> Tensor:
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch():
        return torch.empty(1, dtype=dtype, device="cpu")


class CompiledReader:
    """The C++ reader, which takes dtypes by example."""

    __slots__ = (
        "addresses",
        "held",
        "read",
        "release",
        "replace",
        "source",
        "unchanged",
    )

    def __init__(self, shim: Any) -> None:
        source = _C.GradientReader(shim)
        self.source = source
        self.read = source.read
        self.unchanged = source.unchanged
        self.replace = source.replace
        self.held = source.held
        self.addresses = source.addresses
        self.release = source.release

    def watch(
        self,
        group: int,
        param: Tensor | None,
        grad_strides: Sequence[int],
        grad_dtype: torch.dtype,
        state: StateEntries,
        sharding: Sharding | None = None,
        counts_there: bool = False,
    ) -> None:
        spec = None if sharding is None else sharding.spec
        self.source.watch(group, param, tuple(grad_strides), _sample(grad_dtype), tuple(state), spec, counts_there)

    def written(self) -> Any:
        return self.source


class Addresses:
    """Gradient addresses in a list, 0 where there is none."""

    def __init__(self) -> None:
        self._grads: list[int] = []

    def replace(self, index: int, address: int) -> None:
        self._grads[index] = address

    def addresses(self) -> list[int]:
        return self._grads

    @property
    def source(self) -> list[int]:
        return self._grads


class ListReader(Addresses):
    """Tensors handed over in lists, for one step, of which nothing is known before.

    Args:
        runs_user_code: whether the step will run functions of the user's, so that they are watched meanwhile.
    """

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor | None], *, runs_user_code: bool) -> None:
        self._grads = [0] * len(grads)
        self._params = params
        self._given = grads
        self._runs_user_code = runs_user_code
        self._known_memory: list[tuple[Tensor, Any]] = []

    def watch(
        self,
        group: int,
        param: Tensor | None,
        strides: object,
        dtype: object,
        state: StateEntries,
        sharding: Sharding | None = None,
        counts_there: bool = False,
    ) -> None:
        if self._runs_user_code and param is not None:
            self._known_memory += [(tensor, _memory_of(tensor)) for tensor in (param, *(value for _, value in state))]

    def unchanged(self) -> bool:
        return all(_memory_of(tensor) == place for tensor, place in self._known_memory)

    def read(self, *_: object) -> list[int]:
        return [index for index, grad in enumerate(self._given) if grad is not None]

    def written(self) -> list[Tensor]:
        return [param for param, address in zip(self._params, self._grads, strict=True) if address]

    def held(self, index: int) -> tuple[Any, ...]:
        return self._params[index], self._given[index]

    def release(self) -> None:
        pass


class PythonReader(Addresses):
    """Does what the compiled reader does, for a torch whose C shim is not found."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: list[tuple[Any, ...]] = []
        self._held: dict[int, tuple[Any, ...]] = {}
        self._owners: dict[int, Tensor] = {}
        self._known_memory: dict[int, tuple[Any, ...]] = {}  # of the gradients that are read where they lie

    def watch(
        self,
        group: int,
        param: Tensor | None,
        grad_strides: Sequence[int],
        grad_dtype: torch.dtype,
        state: StateEntries,
        sharding: Sharding | None = None,
        counts_there: bool = False,
    ) -> None:
        place = None if param is None else _memory_of(shards.local(param))
        entries = [(name, _memory_of(value)) for name, value in state]
        count_version = state[-1][1]._version if counts_there and state else None
        self._watched.append((group, place, tuple(grad_strides), grad_dtype, entries, sharding, count_version))
        self._grads.append(0)

    def read(self, param_groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any] | None) -> list[int] | None:
        self.release()
        self._grads = [0] * len(self._watched)
        params = [(param, i) for i, group in enumerate(param_groups) for param in group["params"]]
        if [i for _, i in params] != [group for group, *_ in self._watched]:
            return None
        needs_copy = []
        for index, ((owner, _), (_, place, strides, dtype, entries, sharding, count_version)) in enumerate(
            zip(params, self._watched, strict=True)
        ):
            grad = owner.grad
            if grad is None:
                continue
            param = shards.local(owner)
            if place is None or (param is owner) != (sharding is None) or _memory_of(param) != place:
                return None
            given = grad
            is_spread_alike = sharding is not None and shards.is_sharded(grad) and grad._spec is sharding.spec
            if is_spread_alike:
                grad = shards.local(grad)
            held = [param, grad]
            self._owners[index] = owner
            if state is not None:
                own = state.get(owner, {})
                for name, noted in entries:
                    if not isinstance(own.get(name), Tensor) or _memory_of(own[name]) != noted:
                        return None
                    held.append(own[name])
                if count_version is not None and held[-1]._version != count_version:
                    return None
            self._held[index] = tuple(held)
            found = _memory_of(grad)
            if (
                found is not None
                and is_spread_alike == (sharding is not None)
                and grad.dtype == dtype
                and grad.shape == param.shape
                and grad.device == param.device
                and memory_order.same_strides(grad, strides)
            ):
                self._grads[index] = grad.data_ptr() or 1
                self._known_memory[index] = found
            else:
                self._held[index] = (param, given, *held[2:])
                needs_copy.append(index)
        return needs_copy

    def unchanged(self) -> bool:
        for index, (param, grad, *state) in self._held.items():
            _, place, _, _, entries, *_ = self._watched[index]
            if _memory_of(param) != place or (
                index in self._known_memory and _memory_of(grad) != self._known_memory[index]
            ):
                return False
            if any(_memory_of(value) != noted for value, (_, noted) in zip(state, entries, strict=False)):
                return False
        return True

    def written(self) -> list[Tensor]:
        # All but the gradient, and the number of steps, which is last.
        return [
            tensor
            for index, (param, _, *state) in self._held.items()
            if self._grads[index]
            # A DTensor has a version beside its part's.
            for tensor in dict.fromkeys((param, self._owners[index], *state[:-1]))
        ]

    def held(self, index: int) -> tuple[Any, ...]:
        return self._held[index]

    def release(self) -> None:
        self._held = {}
        self._owners = {}
        self._known_memory = {}


def _shim() -> Any | None:
    """torch's C shim, or None where this torch does not have what is needed of it."""
    # Inside a transform of torch.func samples would be its own tensors. No step is taken there.
    return None if torch._C._functorch.peek_interpreter_stack() is not None else _shim_of_torch()


@functools.cache
def _shim_of_torch() -> Any | None:
    name = "libtorch_cpu.dylib" if sys.platform == "darwin" else "libtorch_cpu.so"
    path = os.path.join(os.path.dirname(torch.__file__), "lib", name)
    # Real ones, whatever modes their user is in, of sizes and versions by which they are told apart.
    with torch._C.DisableTorchFunction(), torch._C._DisableTorchDispatch(), outside_inference_mode():
        samples: list[Tensor] = [torch.empty(1009 + 2 * i, dtype=torch.float32, device="cpu") for i in range(16)]
        samples.insert(1, torch.nn.Parameter(torch.empty(997, dtype=torch.float32, device="cpu")))
        for i, sample in enumerate(samples):
            torch._C._increment_version([sample] * (500 + i))
        try:
            return _C.TorchShim(path, torch._C.TensorBase, samples)
        except RuntimeError:
            return None


def make_reader() -> GradientReader:
    """The fastest reader this torch allows."""
    shim = _shim()
    return PythonReader() if shim is None else CompiledReader(shim)


def kind() -> str:
    """What ``signadam info`` says of the reader."""
    shim = _shim()
    if shim is None:
        return "Python (torch's C shim was not found)"
    known = (
        ("tensors", shim.recognises),
        ("versions", shim.counts_versions),
        ("lazy negation", shim.knows_negation),
    )
    found = [text for text, holds in known if holds]
    return f"C++ (torch's C shim; knows torch's objects for {', '.join(found) or 'nothing'})"


def _memory_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Address, device, dtype, shape and strides; None where the memory does not hold the tensor's numbers."""
    if tensors.memory_fault(tensor) is not None or tensor.is_neg():
        return None
    strides = [1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, strides
