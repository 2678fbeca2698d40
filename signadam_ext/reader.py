"""Reads what may have moved since a plan was made. In C++ where torch offers DLPack's C interface, otherwise here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._extension import load
from .dtypes import DLPACK_TYPES

_C = load()


class CompiledReader:
    """A thin wrapper of the C++ reader, which takes dtypes by DLPack's numbers."""

    __slots__ = ("source",)

    def __init__(self, api: object) -> None:
        self.source = _C.Reader(api)

    def read(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any] | None) -> list[int] | None:
        odd: list[int] | None = self.source.read(param_groups, state)
        return odd

    def replace(self, slot: int, address: int) -> None:
        self.source.replace(slot, address)

    def present(self) -> int:
        return int(self.source.present())

    def release(self) -> None:
        self.source.release()

    def addresses(self) -> list[int]:
        return list(self.source.addresses())

    def watch(
        self,
        param: Tensor,
        group: int,
        strides: Sequence[int],
        grad_dtype: torch.dtype | None,
        state: dict[str, Any] | None,
    ) -> None:
        code = None if grad_dtype is None else DLPACK_TYPES[grad_dtype]
        self.source.watch(param, group, tuple(strides), code, state)


class Addresses:
    """Gradient addresses in a list, 0 where there is none."""

    def __init__(self) -> None:
        self._grads: list[int] = []

    def replace(self, slot: int, address: int) -> None:
        self._grads[slot] = address

    def present(self) -> int:
        """How many parameters have a gradient this step."""
        return sum(address != 0 for address in self._grads)

    def release(self) -> None:
        """The step is done: what was kept alive for it may go."""

    def addresses(self) -> list[int]:
        return self._grads

    @property
    def source(self) -> list[int]:
        """What a table takes gradient addresses from."""
        return self._grads


class ListReader(Addresses):
    """Gradients handed over in a list, for one step: nothing is known of them, and nothing watched."""

    def __init__(self, grads: Sequence[Tensor | None]) -> None:
        self._grads = [0] * len(grads)
        self._given = grads

    def watch(self, *_: object) -> None:
        pass

    def read(self, *_: object) -> list[int]:
        return [slot for slot, grad in enumerate(self._given) if grad is not None]


class PythonReader(Addresses):
    """The same as the compiled reader, for a torch without that interface (before 2.10)."""

    def __init__(self) -> None:
        super().__init__()
        self._watched: list[tuple[Any, ...]] = []
        self._kept: list[Tensor] = []  # a subclass may make a gradient when asked, and keep none

    def watch(
        self,
        param: Tensor,
        group: int,
        strides: Sequence[int],
        grad_dtype: torch.dtype | None,
        state: dict[str, Any] | None,
    ) -> None:
        place = None if grad_dtype is None else _place(param)
        items = (
            None if state is None else [(k, v, _place(v) if isinstance(v, Tensor) else None) for k, v in state.items()]
        )
        self._watched.append((param, group, place, tuple(strides), grad_dtype, state, items))
        self._grads.append(0)

    def read(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any] | None) -> list[int] | None:
        if not self._unmoved(param_groups, state):
            return None
        odd = []
        for slot, (param, _, place, strides, dtype, _, _) in enumerate(self._watched):
            grad = param.grad
            self._grads[slot] = 0
            if grad is None:
                continue
            self._kept.append(grad)
            if place is None:
                return None
            if (
                grad.layout == torch.strided
                and grad.dtype == dtype
                and grad.stride() == strides
                and grad.shape == param.shape
                and grad.device == param.device
                and not grad.is_neg()
            ):
                self._grads[slot] = grad.data_ptr() or 1
            else:
                odd.append(slot)
        return odd

    def release(self) -> None:
        self._kept.clear()

    def _unmoved(self, param_groups: list[dict[str, Any]], state: dict[Tensor, Any] | None) -> bool:
        params = [(param, i) for i, group in enumerate(param_groups) for param in group["params"]]
        if len(params) != len(self._watched):
            return False
        for (param, group), (watched, was_in, place, _, _, held, items) in zip(params, self._watched, strict=True):
            if param is not watched or group != was_in:
                return False
            if place is None:
                continue
            if _place(param) != place:
                return False
            if state is not None and held is not None and not (state.get(param) is held and _same_items(held, items)):
                return False
        return True


def make_reader() -> CompiledReader | PythonReader:
    """The fastest reader this torch allows."""
    api = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return PythonReader() if api is None else CompiledReader(api)


def _place(tensor: Tensor) -> tuple[Any, ...] | None:
    if tensor.layout != torch.strided:
        return None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _same_items(state: Any, items: list[tuple[str, Any, Any]] | None) -> bool:
    if items is None or len(state) != len(items):
        return False
    return all(
        key == k and value is v and (place is None or _place(value) == place)
        for (key, value), (k, v, place) in zip(state.items(), items, strict=True)
    )
