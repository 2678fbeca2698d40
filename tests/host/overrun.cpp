// A piece that is one element longer than its tensor: what the sanitizers must find.
#include <cstdlib>

#include "host_block.h"

int main() {
  using namespace signadam;
  auto* param = static_cast<uint16_t*>(std::malloc(7 * sizeof(uint16_t)));
  Slice slice{};
  slice.count = 7;
  const Operand operand = Operand::of(param, Format::bf16, slice);
  const float x[piece_size] = {};
  operand.store(Piece{0, 8, 0}, x);
  std::free(param);
  return 0;
}
