#include "cpu/nearest_keys_dot.h"

#include "core/isa.h"

namespace memad_fast {

const DotKernel& active_dot_kernel() {
  switch (active_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return avx2::dot_kernel;
    case Isa::avx2_vnni:
      return avx2_vnni::dot_kernel;
    case Isa::avx512:
      return avx512::dot_kernel;
    case Isa::avx512_vnni:
      return avx512_vnni::dot_kernel;
    case Isa::amx:
      return amx::dot_kernel;
#elif defined(__aarch64__)
    case Isa::neon_dotprod:
      return neon_dotprod::dot_kernel;
#endif
    default:
      return portable::dot_kernel;
  }
}

}  // namespace memad_fast
