// csrc/core/program.h on the host, as a library for ctypes.
#include "../../csrc/core/program.h"

using namespace signadam;

extern "C" {

// Runs a program of `length` operations, four numbers each, on a row of `width` values; `results` has the register of
// each of `count` numbers, which are left in `found`. Returns the bytes of what an operation is.
int run(const int32_t* program, int length, const double* row, int width, double t, double factor,
        const int32_t* results, int count, double* found) {
  double registers[program_registers];
  registers[register_t] = t;
  registers[register_factor] = factor;
  for (int i = 0; i < width; ++i) registers[register_values + i] = row[i];
  run_program(reinterpret_cast<const Instruction*>(program), length, registers);
  for (int i = 0; i < count; ++i) found[i] = registers[results[i]];
  return sizeof(Instruction);
}
}
