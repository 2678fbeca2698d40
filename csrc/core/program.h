// The formulas of a group's scalars as a program of doubles, which signadam_ext/core/program.py has recorded.
#pragma once

#include "scalars.h"
#include "threshold.h"

namespace signadam {

// In the order of their numbers. Each is one rounding, but for `power`, `logarithm` and `exponential`, which are
// as in core/symbols.py.
#define SIGNADAM_OPERATIONS(X) \
  X(nothing)                   \
  X(add)                       \
  X(subtract)                  \
  X(multiply)                  \
  X(divide)                    \
  X(negate)                    \
  X(square_root)               \
  X(power)                     \
  X(at_least)                  \
  X(logarithm)                 \
  X(exponential)               \
  X(is_nonzero)

enum class Operation : int32_t {
#define SIGNADAM_OPERATION(name) name,
  SIGNADAM_OPERATIONS(SIGNADAM_OPERATION)
#undef SIGNADAM_OPERATION
};

// The first registers hold a step, and what its gradients are multiplied by; the next a row of values.
constexpr int register_t = 0, register_factor = 1, register_values = 2;
constexpr int program_registers = 128;

// registers[to] = registers[a] <operation> registers[b]; of one operand, b is a.
struct Instruction {
  int32_t operation, a, b, to;
};

// `exponent`: a whole number.
SIGNADAM_HD double power(double base, double exponent) {
  double result = 1.0;
  SIGNADAM_ROLLED
  for (auto left = static_cast<uint64_t>(exponent); left > 0; left >>= 1) {
    if ((left & 1) != 0) result *= base;
    base *= base;
  }
  return result;
}

// The natural logarithm of a number that is at least 1: of what is left after halvings, which are exact, by the series
// of the inverse hyperbolic tangent. An infinite one ends as well.
SIGNADAM_HD double logarithm(double x) {
  double halvings = 0.0;
  SIGNADAM_ROLLED
  for (; x >= 2.0 && halvings < 1024.0; halvings += 1.0) x *= 0.5;
  const double z = (x - 1.0) / (x + 1.0), square = z * z;
  double series = 0.0;
  SIGNADAM_ROLLED
  for (double k = 35.0; k > 0.0; k -= 2.0) series = 1.0 / k + square * series;
  return halvings * 0.6931471805599453 + 2.0 * z * series;
}

SIGNADAM_HD double result_of(Operation operation, double a, double b) {
  switch (operation) {
    case Operation::add:
      return a + b;
    case Operation::subtract:
      return a - b;
    case Operation::multiply:
      return a * b;
    case Operation::divide:
      return a / b;
    case Operation::negate:
      return -a;
    case Operation::square_root:
      return double_root(a);
    case Operation::power:
      return power(a, b);
    case Operation::at_least:
      return b > a ? b : a;
    case Operation::logarithm:
      return logarithm(a);
    case Operation::exponential:
      return exponential(a);
    default:
      return a != 0.0 ? 1.0 : 0.0;
  }
}

// `registers` has the step, the factor and the row of values.
template <class Registers>
SIGNADAM_HD void run_program(const Instruction* program, int length, Registers registers) {
  SIGNADAM_ROLLED
  for (int i = 0; i < length; ++i) {
    const Instruction own = program[i];
    const auto operation = static_cast<Operation>(own.operation);
    if (operation == Operation::nothing) break;  // and nothing comes after it
    registers[own.to] = result_of(operation, registers[own.a], registers[own.b]);
  }
}

}  // namespace signadam
