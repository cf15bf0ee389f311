#include "core/huge_pages.h"

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace memad_fast {

void prefer_huge_pages(void* data, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // The size on x86-64, and on aarch64 with pages of 4 KiB. Below a few of them the call costs more than it saves.
  constexpr std::uintptr_t kHugePage = std::uintptr_t{2} << 20;
  constexpr std::size_t kLeast = 4 * kHugePage;
  if (bytes < kLeast) return;
  const std::uintptr_t start = (reinterpret_cast<std::uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t stop = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  madvise(reinterpret_cast<void*>(start), stop - start, MADV_HUGEPAGE);  // a refusal leaves small pages
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace memad_fast
