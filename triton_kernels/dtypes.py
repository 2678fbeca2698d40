"""Storage formats <-> fp32, by integer operations for bf16: the interpreter's own conversions truncate."""

import triton
import triton.language as tl

# As in csrc/dtypes.h.
FP32 = tl.constexpr(0)
BF16 = tl.constexpr(1)
FP16 = tl.constexpr(2)


@triton.jit
def pointer_to(address, FORMAT: tl.constexpr):
    """The address as a pointer to elements; 16-bit formats as their bits."""
    if FORMAT == FP32:
        return address.to(tl.pointer_type(tl.float32))
    else:
        return address.to(tl.pointer_type(tl.uint16))


@triton.jit
def widen(x, FORMAT: tl.constexpr):
    if FORMAT == BF16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == FP16:
        return x.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x


@triton.jit
def narrow(x, FORMAT: tl.constexpr):
    """To nearest even."""
    if FORMAT == BF16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    elif FORMAT == FP16:
        return x.to(tl.float16).to(tl.uint16, bitcast=True)
    else:
        return x
