"""What PTX says of numbers where NumPy says otherwise: not-a-number, rounding, saturation, shifts by many bits."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray
U16, U32, U64 = np.uint16, np.uint32, np.uint64
#: What arithmetic gives where it gives no number.
QUIET = {2: U16(0x7FFF), 4: U32(0x7FFFFFFF), 8: U64(0x7FFFFFFFFFFFFFFF)}


def bits(x: Array) -> Array:
    """The bits of what arithmetic has given."""
    found = x.view(f"u{x.itemsize}")
    nan = np.isnan(x)
    return np.where(nan, QUIET[x.itemsize], found) if nan.any() else found


def _extreme(a: Array, b: Array, larger: bool) -> Array:
    a, b = np.broadcast_arrays(a, b)
    first = a > b if larger else a < b
    kind = f"u{a.itemsize}"
    # Of equal ones, which are zeros where they differ, +0 is the larger.
    ours, theirs = np.ascontiguousarray(a).view(kind), np.ascontiguousarray(b).view(kind)
    equal = (ours & theirs if larger else ours | theirs).view(a.dtype)
    found = np.where(first, a, np.where(a == b, equal, b))
    return np.where(np.isnan(b), a, found)


def largest(a: Array, b: Array) -> Array:
    """max.f32: a number where there is one."""
    return _extreme(a, b, True)


def smallest(a: Array, b: Array) -> Array:
    return _extreme(a, b, False)


def _with_nan(found: Array, a: Array, b: Array) -> Array:
    return np.where(np.isnan(a) | np.isnan(b), found.dtype.type(np.nan), found)


def largest_or_nan(a: Array, b: Array) -> Array:
    return _with_nan(largest(a, b), a, b)


def smallest_or_nan(a: Array, b: Array) -> Array:
    return _with_nan(smallest(a, b), a, b)


def fma32(a: Array, b: Array, c: Array) -> Array:
    """a * b + c, rounded once."""
    # The product is exact in double. Their sum, rounded to odd, is what fp32 rounds as it would the exact one.
    product = a.astype(np.float64) * np.float64(b)
    c = np.float64(c)
    total = product + c
    # The error of the sum, by Knuth.
    back = total - product
    error = (product - (total - back)) + (c - back)
    inexact = (error != 0) & np.isfinite(total) & (total.view(U64) & U64(1) == 0)
    toward = np.where((error > 0) == (total > 0), np.int64(1), np.int64(-1))
    odd = np.where(inexact, total.view(np.int64) + toward, total.view(np.int64)).view(np.float64)
    return odd.astype(np.float32)


#: How f.rni and the others round to an integer.
TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def to_integer(x: Array, rounding: str, kind: str) -> Array:
    """cvt to an integer, which saturates; not-a-number becomes 0, of 64 bits the integer with the highest bit alone."""
    limits = np.iinfo(kind)
    whole = TO_INTEGER[rounding](x.astype(np.float64))
    low, high = float(limits.min), float(limits.max)
    inside = (whole >= low) & (whole < high if limits.bits == 64 else whole <= high)
    found = np.where(inside, whole, 0).astype(kind)
    found = np.where(whole > high if limits.bits < 64 else whole >= high, kind_of(kind, limits.max), found)
    found = np.where(whole < low, kind_of(kind, limits.min), found)
    if limits.bits == 64:
        found = np.where(np.isnan(x), np.uint64(1 << 63).astype(kind), found)
    return found


def kind_of(kind: str, value: int) -> Any:
    return np.dtype(kind).type(value)


def toward_zero(operation: str, a: Array, b: Array) -> Array:
    """add, sub, mul or div of fp32, cut off."""
    a, b = np.broadcast_arrays(a, b)
    x, y = a.astype(np.float64), b.astype(np.float64)
    if operation == "div":
        found = (x / y).astype(np.float32)
        beyond = np.abs(found * y) > np.abs(x)
    else:
        y = -y if operation == "sub" else y
        wide = x * y if operation == "mul" else x + y
        # The error of the sum, by Knuth; a product is exact.
        back = wide - x
        error = 0 * wide if operation == "mul" else (x - (wide - back)) + (y - back)
        found = wide.astype(np.float32)
        far = np.abs(found.astype(np.float64)) - np.abs(wide)
        beyond = (far > 0) | (far == 0) & (error * wide < 0)
    finite = np.isfinite(a) & np.isfinite(b) & ~np.isnan(found)
    return np.where(beyond & finite, np.nextafter(found, np.float32(0)), found)


def saturated(x: Array) -> Array:
    """Within [0, 1], and 0 where there is no number."""
    return np.where(np.isnan(x), x.dtype.type(0), np.clip(x, 0, 1).astype(x.dtype))


def bfloat16(x: Array) -> Array:
    """The bits of x in bfloat16, rounded to nearest even."""
    word = x.view(U32)
    rounded = ((word + U32(0x7FFF) + ((word >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), QUIET[2], rounded)


def shifted(x: Array, by: Array, left: bool) -> Array:
    """shl and shr: a shift by more than there are bits leaves none, or the sign."""
    size = 8 * x.itemsize
    by = np.minimum(by, size).astype(x.dtype)
    return x << by if left else x >> by


def funnel(low: Array, high: Array, by: Array, left: bool, wrap: bool) -> Array:
    """shf: 32 bits of the 64 in high and low."""
    by = (by & U32(31) if wrap else np.minimum(by, U32(32))).astype(U64)
    both = high.astype(U64) << U64(32) | low
    return (both << by >> U64(32) if left else both >> by).astype(U32)


def field(x: Array, begin: Array, length: Array, signed: bool) -> Array:
    """bfe: so many bits from there on."""
    size = 8 * x.itemsize
    begin, length = np.uint64(begin) & U64(255), np.uint64(length) & U64(255)
    wide = x.astype(U64)
    end = np.minimum(begin + length, U64(size))
    begin = np.minimum(begin, U64(size))
    count = np.where(end > begin, end - begin, U64(0))
    whole = np.where(count >= 64, ~U64(0), (U64(1) << np.minimum(count, U64(63))) - U64(1))
    found = np.where(begin >= 64, U64(0), wide >> np.minimum(begin, U64(63))) & whole
    if signed:
        # What lies beyond the end is the sign: of the last bit of the field, or of x where the field reaches further.
        place = np.minimum(np.where(end > 0, end - U64(1), U64(0)), U64(size - 1))
        sign = (wide >> place & U64(1)) * (length > 0)
        found = np.where(sign == 1, found | ~whole, found)
    return found.astype(x.dtype)


def inserted(x: Array, into: Array, begin: Array, length: Array) -> Array:
    """bfi: the lowest bits of x in place of those."""
    size = U64(8 * into.itemsize)
    begin, length = np.uint64(begin) & U64(255), np.uint64(length) & U64(255)
    wide, x = into.astype(U64), x.astype(U64)
    whole = np.where(length >= 64, ~U64(0), (U64(1) << np.minimum(length, U64(63))) - U64(1))
    mask = np.where(begin >= size, U64(0), whole << np.minimum(begin, U64(63)))
    return (wide & ~mask | (x << np.minimum(begin, U64(63))) & mask).astype(into.dtype)


def permuted(a: Array, b: Array, selector: Array) -> Array:
    """prmt: four bytes of eight."""
    both = b.astype(U64) << U64(32) | a
    found: Any = U32(0)
    for i in range(4):
        choice = selector >> U32(4 * i) & U32(15)
        byte = (both >> ((choice & U32(7)).astype(U64) * U64(8)) & U64(255)).astype(U32)
        sign = np.where(byte >> U32(7) == 1, U32(255), U32(0))
        found = found | np.where(choice & U32(8) != 0, sign, byte) << U32(8 * i)
    return found


def table_of_bits(a: Array, b: Array, c: Array, table: int) -> Array:
    """lop3: what the table says of each three bits."""
    found: Any = np.zeros_like(a | b | c)
    for i in range(8):
        if table >> i & 1:
            found = found | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def high_half(a: Array, b: Array) -> Array:
    """mul.hi of 32 bits."""
    wide = a.astype("i8" if a.dtype.kind == "i" else "u8") * b
    return (wide >> wide.dtype.type(32)).astype(a.dtype)


def high_half_64(a: Array, b: Array) -> Array:
    """mul.hi.u64, by halves."""
    low, shift = U64(0xFFFFFFFF), U64(32)
    a0, a1, b0, b1 = a & low, a >> shift, b & low, b >> shift
    middle = (a0 * b0 >> shift) + (a1 * b0 & low) + (a0 * b1 & low)
    return a1 * b1 + (a1 * b0 >> shift) + (a0 * b1 >> shift) + (middle >> shift)


def leading_zeros(x: Array) -> Array:
    found = np.full(x.shape, 8 * x.itemsize, dtype=U32)
    for place in range(8 * x.itemsize):
        found = np.where(x >> x.dtype.type(place) & x.dtype.type(1) != 0, U32(8 * x.itemsize - 1 - place), found)
    return found


def reversed_bits(x: Array) -> Array:
    found = np.zeros_like(x)
    one = x.dtype.type(1)
    for _ in range(8 * x.itemsize):
        found = found << one | x & one
        x = x >> one
    return found


def quotient(a: Array, b: Array) -> Array:
    """div of integers, toward zero; by 0 it is whatever: all bits set."""
    by_zero = b == 0
    safe = np.where(by_zero, b.dtype.type(1), b)
    found = a // safe
    if a.dtype.kind == "i":
        found = found + ((found < 0) & (found * safe != a)).astype(a.dtype)
    return np.where(by_zero, ~a.dtype.type(0), found)


def remainder(a: Array, b: Array) -> Array:
    return np.where(b == 0, a, a - quotient(a, b) * b)
