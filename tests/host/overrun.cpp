// Memory that is too short for its tensor: what the sanitizers must find. The argument says which.
#include <cstdlib>
#include <cstring>

#include "host_block.h"

namespace {

using namespace signadam;

constexpr Piece whole{0, piece_size, 0};

// Room for 7 elements, and a piece of 8.
void param() {
  void* const memory = std::malloc(7 * sizeof(uint16_t));
  Slice slice{};
  slice.count = 7;
  const float x[piece_size] = {};
  Operand::of(memory, Format::bf16, slice).store(whole, x);
  std::free(memory);
}

// A run of codes without its exponent.
void codes() {
  void* const memory = std::malloc(packed_run);
  Slice slice{};
  slice.count = packed_run, slice.tensor.numel = packed_run;
  const float x[piece_size] = {};
  StoredMoment::of(memory, Format::block8, slice).store_scaled(0, x, {}, 0);
  std::free(memory);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "param") == 0) param();
  if (argc == 2 && std::strcmp(argv[1], "codes") == 0) codes();
  return 0;
}
