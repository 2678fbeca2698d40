"""Checks of everything a user hands in. Each error names the argument, its value, and what would be right."""

from __future__ import annotations

import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .dtypes import FORMATS
from .storage import FP32, Form

T = TypeVar("T")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> str:
    """``value``, if it is one of ``allowed``.

    Raises:
        ValueError: otherwise, with the nearest allowed value.
    """
    allowed = list(allowed)
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, allowed))}{hint}")


def number(name: str, value: Any, low: float, high: float = math.inf, *, open_high: bool = True) -> None:
    """Raises unless ``value`` is a finite number in ``[low, high)``, or ``[low, high]`` if not ``open_high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    inside = value >= low and (value < high if open_high else value <= high)
    if not inside or not math.isfinite(value):
        bracket = ")" if open_high else "]"
        bounds = f"in [{low:g}, {high:g}{bracket}" if math.isfinite(high) else f"finite and at least {low:g}"
        raise ValueError(f"{name}={value!r}: must be {bounds}")


def learning_rate(value: Any) -> None:
    """Accepts a number or a CPU tensor of one element, at least 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            raise ValueError(f"lr={value!r}: a tensor lr must hold one floating-point number")
        if value.device.type != "cpu":
            raise ValueError(
                f"lr is a tensor on {value.device}: reading it would synchronize every step; keep it on the CPU, where "
                "schedulers update it all the same"
            )
        value = value.item()
    number("lr", value, 0.0)


def beta(name: str, value: Any) -> None:
    number(name, value, 0.0, 1.0)


def betas(values: Any, names: tuple[str, ...]) -> None:
    """Raises unless ``values`` holds one number in [0, 1) for each name."""
    if not isinstance(values, (tuple, list)) or len(values) != len(names):
        raise ValueError(f"betas={values!r}: must be a tuple of {len(names)}")
    for name, value in zip(names, values, strict=True):
        beta(name, value)


def look_up(name: str, value: Any, table: Mapping[str, T]) -> T:
    """``table[value]``.

    Raises:
        ValueError: no such entry, with the nearest there is.
    """
    try:
        return table[value]
    except (KeyError, TypeError):
        one_of(name, value, table)
        raise


def share(name: str, value: Any) -> None:
    """Raises unless ``value`` is a number strictly between 0 and 1."""
    number(name, value, -math.inf)
    if not 0 < value < 1:
        raise ValueError(f"{name}={value!r}: must be in (0, 1)")


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be True or False")


def unused_torch_option(name: str, value: Any, *, may_be_true: bool = False) -> None:
    """Options of torch.optim that mean nothing here are accepted where they ask for nothing."""
    if value is None or value is False or (value is True and may_be_true):
        return
    allowed = "None, False or True" if may_be_true else "None or False"
    why = "the update is fused already" if name == "foreach" else "the update is not recorded by autograd"
    raise ValueError(f"{name}={value!r}: must be {allowed}; {why}")


def parameter(label: str, param: Tensor) -> None:
    """Raises unless ``param`` is a tensor that a kernel can update in place.

    Raises:
        TypeError: another dtype or layout, or a subclass without storage of its own.
        ValueError: elements that share memory.
    """
    strided(label, param)
    if param.dtype not in FORMATS:
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
    strided(f"the gradient of {label}", grad)
    if grad.dtype not in FORMATS:
        raise TypeError(f"the gradient of {label} has dtype {grad.dtype}: supported are float32, bfloat16 and float16")
    if grad.shape != param.shape:
        raise ValueError(
            f"the gradient of {label} has shape {tuple(grad.shape)}: must be the parameter's, {tuple(param.shape)}"
        )
    if grad.device != param.device:
        raise ValueError(f"the gradient of {label} is on {grad.device}: must be on {param.device}, like the parameter")


def state_tensor(
    label: str,
    value: Any,
    shape: Sequence[int],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device | None = None,
    content: str = "",
) -> None:
    """Raises unless ``value`` is a tensor of that shape, of one of the dtypes, on the device (None: on any).

    ``content`` says in the error what the tensor holds.
    """
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    place = "" if device is None else f" on {device}"
    expected = f"a {names} tensor of shape {tuple(shape)}{place}{content}"
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} is {value!r}: must be {expected}")
    if value.dtype not in dtypes:
        raise TypeError(f"{label} has dtype {value.dtype}: must be {expected}")
    if value.shape != torch.Size(shape) or (device is not None and value.device != device):
        raise ValueError(f"{label} has shape {tuple(value.shape)} on {value.device}: must be {expected}")
    allocated(label, value)


def moment(label: str, name: str, value: Any, param: Tensor, form: Form = FP32) -> None:
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
    strided(f"grad_variance of {label}", value)
    state_tensor(f"grad_variance of {label}", value, param.shape, tuple(FORMATS), param.device)


def weights(label: str, value: str, dtype: torch.dtype) -> None:
    """Raises unless a parameter of that dtype can be stored that way."""
    if value in ("split16", "split8") and dtype != torch.bfloat16:
        hint = "is its own master: use 'as_is'" if dtype == torch.float32 else "has other low bits: use 'master'"
        raise TypeError(
            f"weights={value!r} splits fp32 into a bfloat16 parameter and its low bits, and {label}, {dtype}, {hint}"
        )


def seed(value: Any) -> None:
    """Raises unless ``value`` is an integer in [0, 2^64)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"seed={value!r}: must be an integer, not {type(value).__name__}")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"seed={value!r}: must be in [0, 2^64)")


def gate(label: str, name: str, value: Any) -> None:
    """Raises unless ``value`` can be what a threshold is made of."""
    if not isinstance(value, Tensor) or value.dtype != torch.float64 or value.dim() > 0:
        raise TypeError(f"state {name!r} of {label} is {value!r}: must be a 0-dim float64 tensor")


def gate_value(label: str, name: str, value: Tensor) -> None:
    """Raises unless what a threshold is made of can have that value."""
    if not 0 <= value.item() < math.inf:
        raise ValueError(f"state {name!r} of {label} is {value.item()!r}: must be finite and at least 0")


def same_strides(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Whether ``tensor`` lies in memory as ``strides`` say. Dimensions of one element have no stride that matters."""
    if tensor.numel() == 0:
        return True
    return all(size == 1 or a == b for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True))


def strided(label: str, tensor: Any) -> None:
    """Raises unless ``tensor`` is one whose elements lie in memory."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} is {tensor!r}: must be a tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} has layout {tensor.layout}: sign-based optimizers need a dense (strided) tensor")
    # A wrapper (DTensor, for one) has no storage of its own, so its address is not where its numbers are.
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(
            f"{label} is a {type(tensor).__name__}, a wrapper of other tensors: optimize the tensors it wraps"
        )
    allocated(label, tensor)


def allocated(label: str, tensor: Tensor) -> None:
    """Raises where a storage has been freed or cut short under its tensor, as sharding does between its uses."""
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    needed = (tensor.storage_offset() + reach) * tensor.element_size() if tensor.numel() else 0
    if tensor.untyped_storage().nbytes() < needed:
        raise ValueError(f"{label} needs a storage of {needed} bytes, and has {tensor.untyped_storage().nbytes()}")


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


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a run of memory, in whatever order."""
    if tensor.numel() == 0 or tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True


#: The most steps that a count can hold exactly, as float64.
MOST_STEPS = 1 << 53


def steps_taken(label: str, value: Any) -> int:
    """A number of steps taken, as a Python integer.

    Args:
        label: what errors call the parameter.
        value: a number, or a tensor of one element.

    Raises:
        TypeError: something else.
        ValueError: a count that no training reaches: negative, fractional, above 2^53, not finite.
    """
    value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain_number(value)
    shown = f"state 'step' of {label} is {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{shown}: must be the number of steps taken")
    if not 0 <= value <= MOST_STEPS or value != int(value):
        raise ValueError(f"{shown}: must be the number of steps taken, a whole number from 0 to 2^53")
    return int(value)


def whole_number(label: str, value: Any) -> int:
    """``value`` as a Python integer, where a checkpoint may have made a tensor or a NumPy scalar of one.

    Raises:
        TypeError: something else.
    """
    found = value.item() if isinstance(value, Tensor) and value.numel() == 1 else plain_number(value)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or found != found or found != found // 1:
        raise TypeError(f"{label} is {value!r}: must be a whole number")
    return int(found)


def plain_number(value: Any) -> Any:
    """A NumPy scalar as the Python number that it stands for; anything else as it is."""
    numpy = sys.modules.get("numpy")  # whoever made one has imported it
    return value.item() if numpy is not None and isinstance(value, numpy.generic) else value


def own_memory(label: str, tensor: Any) -> None:
    """Raises unless the numbers of ``tensor`` lie where its address says, in a storage that covers them.

    Raises:
        TypeError: no dense tensor, or one whose numbers are elsewhere or nowhere: a wrapper of other tensors, a fake
            or meta tensor, one of torch.func.
        ValueError: a storage that has been freed or cut short.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{label} is {tensor!r}: must be a tensor")
    if tensor.layout != torch.strided:
        raise TypeError(f"{label} has layout {tensor.layout}: must be a dense (strided) tensor")
    kind = f"{label} is a {type(tensor).__name__} on {tensor.device}"
    if hasattr(tensor, "__tensor_flatten__"):
        raise TypeError(f"{kind}, a wrapper of other tensors: must be a tensor with memory of its own")
    if tensor.numel() == 0:
        return
    nowhere = f"{kind}, which has no memory of its own: must be a tensor that has"
    try:
        storage = tensor.untyped_storage()
        # A fake tensor says another device than its storage, and warns where it is asked for its address.
        address = 0 if storage.device.type == "meta" else tensor.data_ptr()
    except (RuntimeError, NotImplementedError) as error:
        raise TypeError(nowhere) from error
    if address == 0 and storage.nbytes() > 0:
        raise TypeError(nowhere)
    reach = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)) + 1
    needed = (tensor.storage_offset() + reach) * tensor.element_size()
    if storage.nbytes() < needed:
        raise ValueError(f"{label} needs a storage of {needed} bytes, and has {storage.nbytes()}")
    if address == 0:
        raise TypeError(nowhere)
