"""Checks of tensors. Each error names the tensor, what it is, and what would be right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from . import checks
from .formats import DTYPE_FORMATS, FP32, Format


def parameter(label: str, param: Tensor, *, at_step: bool = True) -> None:
    """Raises unless ``param`` is a tensor that a kernel can update in place.

    Args:
        label: what errors call it.
        param: the tensor.
        at_step: whether it must have its memory by now. An optimizer may be made before: with lazy modules, on the meta
            device, or while sharding keeps the memory elsewhere.

    Raises:
        TypeError: another dtype or layout, or a tensor without memory of its own.
        ValueError: elements that share memory, or a storage that has been freed.
    """
    (strided if at_step else dense)(label, param)
    if is_lazy(param):
        if at_step:
            raise TypeError(f"{label} has not been initialized: run its lazy module once before step()")
        return
    if param.dtype not in DTYPE_FORMATS:
        raise TypeError(f"{label} has dtype {param.dtype}: supported are float32, bfloat16 and float16")
    if param.is_neg():
        raise TypeError(f"{label} is the negative of what its memory holds (is_neg()): optimize a .resolve_neg() of it")
    if overlaps(param):
        raise ValueError(
            f"{label} has elements that share memory (shape {tuple(param.shape)}, strides {param.stride()}), so its "
            "update is not defined: optimize a .clone() or .contiguous() of it"
        )


def gradient(label: str, grad: Tensor, param: Tensor) -> None:
    """Raises unless ``grad`` can be the gradient of ``param`` (dtypes may differ within float32, bfloat16, float16)."""
    dense(f"the gradient of {label}", grad)
    if grad.dtype not in DTYPE_FORMATS:
        raise TypeError(f"the gradient of {label} has dtype {grad.dtype}: supported are float32, bfloat16 and float16")
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {label} has shape {tuple(grad.shape)}: must be the parameter's, {tuple(param.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"the gradient of {label} is on {grad.device}: must be on {param.device}, like the parameter")
    if not is_computable(grad):
        allocated(f"the gradient of {label}", grad)
        aligned(f"the gradient of {label}", grad)


def give_gradient(param: Tensor, grad: Tensor) -> None:
    """Makes ``grad``, which has been checked, the gradient of ``param``, whatever their dtypes."""
    if grad.dtype != param.dtype:
        param.grad_dtype = None  # of which earlier versions of torch have nothing, and refuse the next line
    param.grad = grad


def state_tensor(
    label: str,
    value: Any,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    content: str = "",
    computable: bool = False,
) -> None:
    """Raises unless ``value`` is a tensor of that shape, of one of the dtypes, on the device (None: on any).

    ``content`` says in the error what the tensor holds. ``computable`` allows one without memory of its own that torch
    can copy.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    place = "" if device is None else f" on {device}"
    expected = f"a {names} tensor of shape {tuple(shape)}{place}{content}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} is {checks.shown(value)}: must be {expected}")
    if value.dtype not in dtypes:
        raise TypeError(f"{label} has dtype {value.dtype}: must be {expected}")
    if value.shape != torch.Size(shape) or (device is not None and value.device != device):
        raise ValueError(f"{label} has shape {tuple(value.shape)} on {value.device}: must be {expected}")
    if not (computable and is_computable(value)):
        allocated(label, value)
        aligned(label, value)


def moment(label: str, name: str, value: Any, param: Tensor, form: Format = FP32) -> None:
    """Raises unless ``value`` is a moment on the parameter's device: of its shape, or a packed buffer."""
    shape, content = param.shape, ""
    if form.packed:
        shape = torch.Size((form.nbytes(param.numel()),))
        content = f", {form.kind} codes of {param.numel()} elements"
    state_tensor(f"state {name!r} of {label}", value, shape, (form.dtype,), param.device, content)


def variance(label: str, value: Any, param: Tensor) -> None:
    """Raises unless ``value`` can be the variance of a parameter's gradient."""
    if value is None:
        raise ValueError(
            f"{label} has a gradient and no grad_variance: variance='minibatch' reads the variance of the mini-batch "
            "mean there; call signadam_ext.per_sample_variance(model, loss_fn, batch) before step()"
        )
    dense(f"grad_variance of {label}", value)
    state_tensor(f"grad_variance of {label}", value, param.shape, tuple(DTYPE_FORMATS), param.device, computable=True)


def param_storage(label: str, value: str, dtype: torch.dtype) -> None:
    """Raises unless a parameter of that dtype can be stored that way."""
    if value in ("split16", "split8") and dtype == torch.float16:
        raise TypeError(
            f"param_storage={value!r} splits fp32 into a bfloat16 parameter and its low bits, and {label}, {dtype}, "
            "has other low bits: use 'master'"
        )


def threshold_state(label: str, name: str, value: Any) -> None:
    """Raises unless ``value`` can be what a threshold is made of."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.dim() > 0:
        raise TypeError(f"state {name!r} of {label} is {value!r}: must be a 0-dim float64 tensor")
    aligned(f"state {name!r} of {label}", value)


def threshold_state_value(label: str, name: str, value: Tensor) -> None:
    """Raises unless what a threshold is made of can have that value."""
    if not 0 <= value.item() < math.inf:
        raise ValueError(f"state {name!r} of {label} is {value.item()!r}: must be finite and at least 0")


def strided(label: str, tensor: Any) -> None:
    """Raises unless ``tensor`` is one whose elements lie in memory of its own.

    Raises:
        TypeError: no tensor, another layout, or a tensor whose elements are elsewhere or nowhere: a wrapper of other
            tensors, fake, meta or of torch.func.
        ValueError: a storage that has been freed or cut short under its tensor.
    """
    dense(label, tensor)
    if not is_lazy(tensor):
        allocated(label, tensor)
        aligned(label, tensor)


def dense(label: str, tensor: Any) -> None:
    """Raises unless ``tensor`` is one with strides, and no wrapper of others.

    Raises:
        TypeError: something else.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} is {tensor!r}: must be a tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} has layout {tensor.layout}: sign-based optimizers need a dense (strided) tensor")
    # A wrapper (DTensor, for one) has no storage of its own, so its address is not where its numbers are.
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{label} is a {type(tensor).__name__}, a wrapper of other tensors: optimize the tensors it wraps"
        )


def allocated(label: str, tensor: Tensor) -> None:
    """Raises where a tensor has no memory of its own, or less than it needs, as sharding leaves it between its uses."""
    fault = memory_fault(tensor)
    if fault is not None:
        kind, reason = fault
        raise kind(f"{label} {reason}")


_MODES = tuple(getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL"))


def executed(label: str) -> None:
    """Raises where torch only simulates or records what it is asked for, so that no step can be taken.

    Raises:
        RuntimeError: under FakeTensorMode or another mode that traces, or inside a transform of ``torch.func``.
    """
    mode = None
    if torch._C._len_torch_dispatch_stack():  # 0 nearly always; each step asks
        mode = next((found for key in _MODES if (found := torch._C._get_dispatch_mode(key)) is not None), None)
    if mode is not None or torch._C._functorch.peek_interpreter_stack() is not None:
        active = "a transform of torch.func" if mode is None else type(mode).__name__
        raise RuntimeError(
            f"{label} cannot be updated inside {active}, which executes nothing: take the step outside it"
        )


#: Memory below is never a process's own; an address there is an offset into a storage that was freed.
_FIRST_PAGE = 4096


def memory_fault(tensor: Tensor) -> tuple[type[Exception], str] | None:
    """Why the elements of a strided tensor cannot be read at its address, as an error and its words, or None."""
    nowhere = f"is a {type(tensor).__name__} on {tensor.device}, which has no memory of its own"
    if tensor.layout != torch.strided:
        return TypeError, f"has layout {tensor.layout}"
    if tensor.numel() == 0:
        return None
    # Asked first: torch.func's own question fails on what `.data = ` has made of its tensors.
    if not torch._C._has_storage(tensor) or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return TypeError, f"{nowhere} but torch.func's, or another tensor's"
    try:
        storage = tensor.untyped_storage()
        nbytes = storage.nbytes()
        # A fake tensor says another device than its storage, and warns where it is asked for its address.
        address = 0 if storage.device.type == "meta" else tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        return TypeError, nowhere
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    offset = tensor.storage_offset() * tensor.element_size()
    needed = offset + reach * tensor.element_size()
    if address == 0 and nbytes > 0:
        return TypeError, nowhere
    if nbytes < needed:
        return ValueError, f"needs a storage of {needed} bytes, and has {nbytes}"
    return (TypeError, nowhere) if address - offset < _FIRST_PAGE else None


def is_computable(tensor: Tensor) -> bool:
    """Whether ``copy_`` can read a tensor without memory of its own: a zero tensor, or a ``__torch_dispatch__`` one."""
    return tensor._is_zerotensor() or (
        tensor.device.type != "meta"
        and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        and not hasattr(tensor, "__tensor_flatten__")
        and tensor.layout == torch.strided
        and not is_simulated(tensor)
    )


def is_simulated(tensor: Tensor) -> bool:
    """Whether a tensor has no elements, whatever device it says: a fake one, a copy of which is not written."""
    try:
        return tensor.untyped_storage().device.type == "meta"
    except (RuntimeError, NotImplementedError):
        return False


def made_real(label: str, tensor: Tensor, strides: Sequence[int] | None = None) -> Tensor:
    """A copy in memory of what torch can compute with, in the given strides or the tensor's own.

    Raises:
        TypeError: torch has no elements of it to copy.
    """
    like = tensor.stride() if strides is None else strides
    # A lack of memory is no fault of the tensor's.
    copy = torch.empty_strided(tensor.shape, like, dtype=tensor.dtype, device=tensor.device)
    try:
        copy.copy_(tensor)
    except Exception as error:
        raise TypeError(f"{label} is a {type(tensor).__name__}, and torch gives no elements of it") from error
    allocated(label, copy)
    return copy


def aligned(label: str, tensor: Tensor) -> None:
    """Raises where the address is no multiple of the element size, which only a CPU reads at.

    On a GPU such an access ends every later use of the process's context.
    """
    if tensor.device.type == "cpu":
        return
    size, address = tensor.element_size(), tensor.data_ptr()
    if address % size != 0:
        raise ValueError(
            f"{label} on {tensor.device} lies at address {address:#x}: must be a multiple of its element size, {size} "
            "bytes; use a .clone() of it"
        )


def overlaps(tensor: Tensor) -> bool:
    """Whether two elements may share memory. Dimensions of one element have no stride that matters."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def owned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device that shares nothing. Elements that share memory do so in the copy, which is no larger."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided or not overlaps(tensor):
        return tensor.to(device, copy=True)
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    held = tensor.as_strided((reach,), (1,), tensor.storage_offset()).to(device, copy=True)
    return held.as_strided(tensor.shape, tensor.stride())


def is_lack_of_memory(error: Exception) -> bool:
    """Whether an operation failed for nothing but a lack of memory, for which torch has no type on the CPU."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and ("not enough memory" in str(error) or "allocate memory" in str(error))
