"""The beginning of a step on the device: what the host sends otherwise, made of step counts and values that lie there.

Each tensor's program of scalars is run as csrc/core/program.h does: see signadam_ext/core/program.py.
"""

import triton
import triton.language as tl

from signadam_ext.core.native import compiled as _C

from .random import mix
from .rules import SCALAR_COUNT
from .threshold import exponential

# Columns of the table of tensors, one int64 each: the address of the step count, the seed, the number of which random
# bits are made beside it, and which program and which row of values the tensor's group has.
COLUMNS = ("step", "seed", "param_id", "program", "row")
COLUMN_COUNT = tl.constexpr(len(COLUMNS))
STEP_AT = tl.constexpr(COLUMNS.index("step"))
SEED_AT = tl.constexpr(COLUMNS.index("seed"))
PARAM_ID_AT = tl.constexpr(COLUMNS.index("param_id"))
PROGRAM_AT = tl.constexpr(COLUMNS.index("program"))
ROW_AT = tl.constexpr(COLUMNS.index("row"))

OPERATIONS = _C.OPERATIONS
NOTHING = tl.constexpr(OPERATIONS.index("nothing"))
ADD = tl.constexpr(OPERATIONS.index("add"))
SUBTRACT = tl.constexpr(OPERATIONS.index("subtract"))
MULTIPLY = tl.constexpr(OPERATIONS.index("multiply"))
DIVIDE = tl.constexpr(OPERATIONS.index("divide"))
NEGATE = tl.constexpr(OPERATIONS.index("negate"))
SQUARE_ROOT = tl.constexpr(OPERATIONS.index("square_root"))
POWER = tl.constexpr(OPERATIONS.index("power"))
AT_LEAST = tl.constexpr(OPERATIONS.index("at_least"))
LOGARITHM = tl.constexpr(OPERATIONS.index("logarithm"))
EXPONENTIAL = tl.constexpr(OPERATIONS.index("exponential"))
# The registers of a step and of the factor of gradients; a row of values follows.
T, FACTOR, VALUES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Powers of two.
REGISTERS = tl.constexpr(1 << (_C.PROGRAM_REGISTERS - 1).bit_length())
SCALAR_LANES = tl.constexpr(1 << (len(_C.SCALARS) - 1).bit_length())


@triton.jit
def register(registers, index):
    """One of them. They lie side by side in the program's threads, as the bits of doubles: zeros beside it change
    nothing."""
    bits = tl.sum(tl.where(tl.arange(0, REGISTERS) == index, registers, 0), axis=0)
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def power(base, exponent):
    """``exponent``: a whole number."""
    result = tl.full((), 1.0, tl.float64)
    left = exponent.to(tl.int64)
    while left > 0:
        result = tl.where(left % 2 == 1, result * base, result)
        base = base * base
        left = left // 2
    return result


@triton.jit
def logarithm(x):
    """As in csrc/core/program.h."""
    halvings = tl.full((), 0.0, tl.float64)
    while (x >= 2.0) & (halvings < 1024.0):
        x = x * 0.5
        halvings += 1.0
    z = (x - 1.0) / (x + 1.0)
    square = z * z
    series = tl.full((), 0.0, tl.float64)
    k = tl.full((), 35.0, tl.float64)
    while k > 0.0:
        series = 1.0 / k + square * series
        k -= 2.0
    return halvings * tl.full((), 0.6931471805599453, tl.float64) + 2.0 * z * series


@triton.jit
def result_of(operation, a, b):
    if operation == ADD:
        result = a + b
    elif operation == SUBTRACT:
        result = a - b
    elif operation == MULTIPLY:
        result = a * b
    elif operation == DIVIDE:
        result = a / b
    elif operation == NEGATE:
        result = a * -1.0  # -a compiles to 0 - a, which loses the sign of zero
    elif operation == SQUARE_ROOT:
        result = tl.sqrt(a)
    elif operation == POWER:
        result = power(a, b)
    elif operation == AT_LEAST:
        result = tl.where(b > a, b, a)
    elif operation == LOGARITHM:
        result = logarithm(a)
    elif operation == EXPONENTIAL:
        result = exponential(a)
    else:
        result = tl.where(a != 0.0, 1.0, 0.0).to(tl.float64)
    return result


@triton.jit
def run_program(program, length, registers):
    """The registers after all operations of a program."""
    i = length * 0
    while i < length:
        own = program + 4 * i
        operation = tl.load(own)
        if operation == NOTHING:
            i = length  # nothing comes after it
        else:
            result = result_of(operation, register(registers, tl.load(own + 1)), register(registers, tl.load(own + 2)))
            is_its = tl.arange(0, REGISTERS) == tl.load(own + 3)
            registers = tl.where(is_its, result.to(tl.int64, bitcast=True), registers)
            i += 1
    return registers


@triton.jit
def keys_of(seed, param_id, step):
    """The keys of a tensor's random bits at a step, before an element's high bits have entered. All int64."""
    h0 = tl.full((), 0x243F6A88, tl.uint32)
    h1 = tl.full((), 0x85A308D3, tl.uint32)
    h0, h1 = mix(h0 ^ seed.to(tl.uint32)), mix(h1 ^ seed.to(tl.uint32))
    h0, h1 = mix(h0 ^ (seed >> 32).to(tl.uint32)), mix(h1 ^ (seed >> 32).to(tl.uint32))
    h0, h1 = mix(h0 ^ param_id.to(tl.uint32)), mix(h1 ^ param_id.to(tl.uint32))
    h0, h1 = mix(h0 ^ step.to(tl.uint32)), mix(h1 ^ step.to(tl.uint32))
    return mix(h0 ^ (step >> 32).to(tl.uint32)), mix(h1 ^ (step >> 32).to(tl.uint32))


# One kernel serves every plan.
@triton.jit(do_not_specialize=["length", "width"], do_not_specialize_on_alignment=["values", "control", "grads"])
def begin(entries, operations, results, values, control, grads, out_grads, out_rng_keys, out_scalars, length, width):
    """Begins the step of each tensor; one program a tensor.

    Args:
        entries: int64 ``[tensors, COLUMN_COUNT]``, see ``COLUMNS``; step counts are float64.
        operations: int32 ``[programs, length, 4]``, each (operation, a, b, to).
        results: int32 ``[programs, SCALAR_COUNT]``, the register of each scalar.
        values: float64 ``[rows, width]``, what programs begin with, constants too.
        control: float64, what gradients are multiplied with, and not 0 where the step is skipped.
        grads: int64, address of each tensor's gradient, 0 where it takes no part.
        out_grads: int64, the same for the update: all 0 where the step is skipped.
        out_rng_keys, out_scalars: as the update takes them, a set of scalars for each tensor. Nothing is written of
            tensors that take no part.
        length, width: int32.
    """
    tensor = tl.program_id(0)
    grad = tl.load(grads + tensor)
    takes_part = (grad != 0) & (tl.load(control + 1) == 0.0)
    tl.store(out_grads + tensor, tl.where(takes_part, grad, 0))
    if takes_part:
        entry = entries + tensor * COLUMN_COUNT
        count = tl.load(entry + STEP_AT).to(tl.pointer_type(tl.float64))
        t = tl.load(count) + 1.0
        # Every thread's read comes before.
        tl.debug_barrier()
        tl.store(count, t)
        h0, h1 = keys_of(tl.load(entry + SEED_AT), tl.load(entry + PARAM_ID_AT), t.to(tl.int64))
        tl.store(out_rng_keys + 2 * tensor, h0.to(tl.int32, bitcast=True))
        tl.store(out_rng_keys + 2 * tensor + 1, h1.to(tl.int32, bitcast=True))
        at = tl.arange(0, REGISTERS)
        inside = (at >= VALUES) & (at < width + VALUES)
        row = values + tl.load(entry + ROW_AT) * width
        registers = tl.load(row + at - VALUES, mask=inside, other=0.0)
        registers = tl.where(at == T, t, tl.where(at == FACTOR, tl.load(control), registers))
        number = tl.load(entry + PROGRAM_AT)
        registers = run_program(operations + number * length * 4, length, registers.to(tl.int64, bitcast=True))
        # Written at once, so that no read waits for a write.
        place = tl.arange(0, SCALAR_LANES)
        scalars = tl.zeros([SCALAR_LANES], tl.float64)
        for i in tl.static_range(SCALAR_COUNT):
            scalar = register(registers, tl.load(results + number * SCALAR_COUNT + i))
            scalars = tl.where(place == i, scalar, scalars)
        tl.store(out_scalars + tensor * SCALAR_COUNT + place, scalars, mask=place < SCALAR_COUNT)
