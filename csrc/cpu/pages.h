// Huge pages for memory that this package allocates itself.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace signadam::cpu {

// Asks for huge pages under memory that has not been touched yet: a stream over it then takes fewer page walks. A no-op
// where the system has none to give.
inline void advise_huge_pages(uintptr_t address, std::size_t size) {
#if defined(__linux__)
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  const uintptr_t begin = (address + huge - 1) & ~(huge - 1);
  const uintptr_t end = (address + size) & ~(huge - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)address, (void)size;
#endif
}

}  // namespace signadam::cpu
