"""How parameters and moments are stored between steps: the forms, and their exact conversions to and from fp32.

The kernels do the same in registers. Here it is written in whole-tensor operations, for the reference backend and for
checkpoints. All tensors are flat, in memory order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .memory_order import strides_of
from .native import compiled as _C

#: Codes lie in runs of this many, the last one padded with zeros.
RUN: int = _C.RUN

NAN_CODE = -128


@dataclass(frozen=True)
class Format:
    """One way to store a moment.

    Attributes:
        kind: its name in a checkpoint.
        number: in tables and kernels.
        bits: of one element.
        levels: L of codes q in [-L, L] that stand for q / L; None for the others.
        largest_beta: of a momentum that goes without a warning of the variance that rounding adds; None for any.
    """

    kind: str
    number: int
    bits: int
    levels: int | None = None
    largest_beta: float | None = None

    @property
    def packed(self) -> bool:
        """Whether elements share a buffer of bytes instead of a tensor of the parameter's shape."""
        return self.bits <= 8

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.packed else torch.bfloat16 if self.bits == 16 else torch.float32

    def nbytes(self, numel: int) -> int:
        """Bytes in memory for ``numel`` elements."""
        if not self.packed:
            return numel * self.bits // 8
        runs = -(-numel // RUN)
        return runs * RUN * self.bits // 8 + (runs if self is BLOCK8 else 0)


def _format(name: str, kind: str | None = None, **others: Any) -> Format:
    number, bits = _C.FORMATS[name]
    return Format(kind or name, number, bits, **others)


FP32 = _format("fp32")
BF16 = _format("bf16")
INT8 = _format("int8", levels=127, largest_beta=0.99)
INT4 = _format("int4", levels=7, largest_beta=0.95)
INT2 = _format("int2", levels=1, largest_beta=0.9)
BLOCK8 = _format("block8", kind="int8_block32")

#: Codes without a scale, of a moment that never exceeds 1.
CODES = {form.kind: form for form in (INT8, INT4, INT2)}
FORMATS = {form.kind: form for form in (FP32, BF16, *CODES.values(), BLOCK8)}
#: The same by their numbers, which state holds: some checkpoint formats keep tensors and numbers alone.
FORMATS_BY_NUMBER = {form.number: form for form in FORMATS.values()}
#: By ``state_dtype``, for a moment that never exceeds 1, for any other first moment, and for a second moment.
BOUNDED = {"fp32": FP32, "bf16": BF16, **CODES}
UNBOUNDED = {"fp32": FP32, "bf16": BF16, "int8": BLOCK8}
SECOND = {"fp32": FP32, "bf16": BF16, **dict.fromkeys(CODES, BF16)}

#: The dtypes that kernels read and write, with the numbers of their formats.
DTYPE_FORMATS: dict[torch.dtype, int] = {
    torch.float32: _C.FORMATS["fp32"][0],
    torch.bfloat16: _C.FORMATS["bf16"][0],
    torch.float16: _C.FORMATS["fp16"][0],
}
#: The dtypes that ``state_dtype`` takes beside names, each with its name.
MOMENT_DTYPES: dict[torch.dtype, str] = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    # Those of few bits are not in every version of torch.
    **{getattr(torch, name): name for name in CODES if hasattr(torch, name)},
}
#: Ways to store a parameter, with their numbers in kernels.
PARAM_STORAGES: dict[str, int] = _C.PARAM_STORAGES
#: Name in the state and dtype of what lies beside a parameter.
RESIDUALS = {
    "split16": ("param_low", torch.int16),
    "split8": ("param_low", torch.int8),
    "master": ("master_param", torch.float32),
}


def outside_inference_mode() -> contextlib.AbstractContextManager[object]:
    """A context for making what later steps need, which must not be inference tensors.

    Nothing is entered where nothing is to be left: an interrupted exit would put back an older state of autograd later.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext()


def effective_param_storage(param_storage: str, dtype: torch.dtype) -> str:
    """What ``param_storage`` means for a parameter of that dtype: an fp32 parameter is its own master."""
    return "nearest" if dtype == torch.float32 else param_storage


def draws(param_storage: str, forms: Iterable[Format]) -> bool:
    """Whether storing uses random bits. ``param_storage`` as :func:`effective_param_storage` gives it."""
    return param_storage in ("stochastic", "split8") or any(form is not FP32 for form in forms)


def bits(x: Tensor) -> Tensor:
    """The bits of fp32 numbers, int64 in [0, 2^32)."""
    return x.view(torch.int32).long() & 0xFFFFFFFF


def from_bits(x: Tensor) -> Tensor:
    """The fp32 numbers with these bits, of int64 in [0, 2^32)."""
    return torch.where(x >= 1 << 31, x - (1 << 32), x).to(torch.int32).view(torch.float32)


def narrow_stochastic(x: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """``x``, fp32, rounded stochastically to bf16 or fp16 by 16 random bits for each element."""
    if dtype == torch.bfloat16:
        rounded = torch.where(x.isnan(), 0x7FC0, bits(x) + r >> 16)
        return _halves(rounded).view(torch.bfloat16)
    magnitude = bits(x) & 0x7FFFFFFF
    small = magnitude < 0x38800000
    normal = magnitude - (112 << 23) + (r >> 3) >> 13
    subnormal = torch.where(small, from_bits(magnitude) * 2.0**40, 0.0).long() + r >> 16
    rounded = torch.where(small, subnormal, normal)
    rounded = torch.where((magnitude <= 0x477FF000) & (rounded >= 0x7C00), 0x7BFF, rounded)
    rounded = torch.where(magnitude >= 0x47800000, torch.where(x.isnan(), 0x7E00, 0x7C00), rounded)
    return _halves(rounded | bits(x) >> 16 & 0x8000).view(torch.float16)


def _halves(x: Tensor) -> Tensor:
    """int64 in [0, 65536) as int16 with the same bits."""
    return torch.where(x >= 1 << 15, x - (1 << 16), x).to(torch.int16)


def load_param(param_storage: str, param: Tensor, residual: Tensor | None) -> Tensor:
    """The fp32 number that a stored parameter stands for."""
    if residual is None:
        return param.float()
    if param_storage == "master":
        return torch.where(_same(residual.to(param.dtype), param), residual, param.float())
    remainder = residual.long() * (256 if param_storage == "split8" else 1)
    joined = from_bits((bits(param.float()) + remainder) & 0xFFFFFFFF)
    return torch.where(joined.isnan(), param.float(), joined)


def _same(a: Tensor, b: Tensor) -> Tensor:
    return a.view(torch.int16) == b.view(torch.int16)


def stored_param(
    param_storage: str, p: Tensor, r: Tensor | None, dtype: torch.dtype, residual: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """The fp32 result ``p`` as it is stored: the parameter, and what lies beside it, as new tensors.

    Args:
        param_storage: as :func:`effective_param_storage` gives it.
        p: fp32.
        r: 16 random bits for each element, where ``param_storage`` rounds stochastically.
        dtype, residual: dtypes of the two; None where nothing lies beside the parameter.
    """
    if param_storage in ("nearest", "master"):
        return p.to(dtype), None if residual is None else p
    if param_storage == "stochastic":
        assert r is not None
        return narrow_stochastic(p, r, dtype), None
    kept = bits(p)
    if param_storage == "split8":
        assert r is not None
        kept = kept + (r >> 8) >> 8
    width = 8 if param_storage == "split8" else 16
    high = kept + (1 << width - 1) >> width
    remainder = kept - (high << width)
    param = _halves(torch.where(p.isnan(), 0x7FC0, high & 0xFFFF)).view(torch.bfloat16)
    return param, torch.where(p.isnan(), 0, remainder).to(residual)


def store_param(param_storage: str, p: Tensor, r: Tensor | None, param: Tensor, residual: Tensor | None) -> None:
    """Writes the fp32 result ``p`` into ``param`` and what lies beside it."""
    new, new_residual = stored_param(param_storage, p, r, param.dtype, None if residual is None else residual.dtype)
    param.copy_(new)
    if residual is not None:
        assert new_residual is not None
        residual.copy_(new_residual)


def allocate(form: Format, param: Tensor) -> Tensor:
    """A moment before the first step: zeros, with the parameter's strides or packed."""
    if form.packed:
        stored = torch.zeros(form.nbytes(param.numel()), dtype=torch.uint8, device=param.device)
        if form is BLOCK8:
            _exponents(stored, param.numel()).fill_(-126)
        return stored
    return torch.empty_strided(param.shape, strides_of(param), dtype=form.dtype, device=param.device).zero_()


def _exponents(stored: Tensor, numel: int) -> Tensor:
    runs = -(-numel // RUN)
    return stored[runs * RUN :].view(torch.int8)


def codes_of(form: Format, stored: Tensor, numel: int) -> Tensor:
    """The int8 codes in a packed buffer."""
    if form.bits == 8:
        return stored[:numel].view(torch.int8)
    per_byte, mask, half = 8 // form.bits, (1 << form.bits) - 1, 1 << form.bits - 1
    # In bytes throughout: the largest tensor's codes may be most of the memory that is left.
    codes = torch.empty(stored.numel(), per_byte, dtype=torch.uint8, device=stored.device)
    for k in range(per_byte):
        codes[:, k] = ((stored >> k * form.bits & mask) ^ half) - half  # wraps around to the bits of an int8
    return codes.flatten()[:numel].view(torch.int8)


def pack(form: Format, codes: Tensor, exponents: Tensor | None = None) -> Tensor:
    """int8 codes as a packed buffer."""
    padded = torch.nn.functional.pad(codes, (0, -codes.numel() % RUN)) if codes.numel() % RUN else codes
    if form.bits == 8:
        parts = [padded.view(torch.uint8)] + ([] if exponents is None else [exponents.view(torch.uint8)])
        return torch.cat(parts)
    per_byte, mask = 8 // form.bits, (1 << form.bits) - 1
    spread = padded.view(torch.uint8).view(-1, per_byte)
    stored = torch.zeros(spread.shape[0], dtype=torch.uint8, device=codes.device)
    for k in range(per_byte):
        stored |= (spread[:, k] & mask) << k * form.bits
    return stored


def decode(form: Format, stored: Tensor, numel: int) -> Tensor:
    """A stored moment as fp32; codes of a bounded moment in units of 1 / L."""
    if not form.packed:
        return stored.float()
    codes = codes_of(form, stored, numel)
    if form is not BLOCK8:
        return codes.float()
    scale = from_bits(_exponents(stored, numel).long() + 127 << 23).repeat_interleave(RUN)
    return torch.where(codes == NAN_CODE, torch.nan, codes.float() * scale[:numel])


def encode(form: Format, m: Tensor, r: Tensor | None) -> Tensor:
    """fp32 values, in the units of :func:`decode`, stored with 16 random bits for each element; fp32 needs none."""
    if form is FP32:
        return m
    assert r is not None
    if form is BF16:
        return narrow_stochastic(m, r, torch.bfloat16)
    if form is not BLOCK8:
        return pack(form, stochastic_integer(m, r).to(torch.int8))
    padded = torch.nn.functional.pad(m, (0, -m.numel() % RUN))
    magnitude = torch.where(padded.isfinite(), bits(padded) & 0x7FFFFFFF, 0).view(-1, RUN)
    exponents = ((magnitude.amax(1) + 0x1FFFF >> 23) - 133).clamp(-126, 120)
    inverse = from_bits(127 - exponents << 23).repeat_interleave(RUN)
    scaled = torch.where(padded.isnan(), 0.0, padded * inverse).clamp(-127.0, 127.0)
    codes = stochastic_integer(scaled, torch.nn.functional.pad(r, (0, -r.numel() % RUN)))
    codes = torch.where(padded.isnan(), NAN_CODE, codes)
    return pack(form, codes.to(torch.int8), exponents.to(torch.int8))


def stochastic_integer(x: Tensor, r: Tensor) -> Tensor:
    """An integer next to ``x``, the upper one with the probability that is the fraction: ``E[q] = x``."""
    return (x * 65536.0).long() + r >> 16


def make_residual(param_storage: str, param: Tensor, remainder: Tensor | None = None) -> Tensor:
    """What lies beside a parameter before its first step: nothing below it, or a copy of it.

    Args:
        param_storage: "split16", "split8" or "master".
        param: the parameter.
        remainder: low bits that a split form left behind, for a master copy to be made of both.
    """
    dtype = RESIDUALS[param_storage][1]
    made = torch.empty_strided(param.shape, strides_of(param), dtype=dtype, device=param.device)
    if param_storage != "master":
        return made.zero_()
    if remainder is None:
        return made.copy_(param.detach())
    was = "split16" if remainder.dtype == torch.int16 else "split8"
    return made.copy_(load_param(was, param.detach().contiguous(), remainder.contiguous()))


def remainder_of_master(param_storage: str, master: Tensor, param: Tensor | None = None) -> Tensor:
    """The low bits that a master copy, flat, has below a bf16 parameter, rounded to nearest where 8 bits are kept.

    Args:
        param_storage: "split16" or "split8".
        master: fp32.
        param: the parameter, flat, where it is known: entries set from outside win, and have nothing below them.
    """
    high = torch.empty(master.shape, dtype=torch.bfloat16, device=master.device)
    remainder = torch.empty(master.shape, dtype=RESIDUALS[param_storage][1], device=master.device)
    half = torch.full(master.shape, 1 << 15, dtype=torch.int64, device=master.device)
    store_param(param_storage, master, half, high, remainder)
    return remainder if param is None else torch.where(_same(high, param), remainder, 0)
