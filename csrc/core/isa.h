// Which instruction set the kernels of this call use: found once, overridden by MEMAD_FAST_ISA or set_isa.
//
// A kernel file (csrc/cpu/<op>_kernel.cpp) is compiled once per level, each time into a namespace of its
// own (memad_fast::portable, ::avx2, ::avx512) and with that level's compiler flags. Nothing outside these
// files is compiled with them, so no wider instruction can leak into code that an older processor runs.
#pragma once

#include <string>
#include <vector>

namespace memad_fast {

enum class Isa : int {
  portable = 0,  // whatever the compiler's baseline has: SSE2 on x86-64, NEON on aarch64
  avx2 = 1,      // AVX2, FMA, F16C (Haswell, Zen and later)
  avx512 = 2,    // AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later)
};

const char* isa_name(Isa isa);

// The levels this build has and this processor can run, lowest first. Never empty.
const std::vector<Isa>& supported_isas();

// The level in force. Throws std::invalid_argument if MEMAD_FAST_ISA names one that cannot run here.
Isa active_isa();

// Force a level by name; "auto" returns to the highest. Throws std::invalid_argument.
void set_isa(const std::string& name);

}  // namespace memad_fast

// Calls memad_fast::<level>::function(...) for the level in force: once per op call, outside every loop.
#if defined(__x86_64__)
#define MEMAD_FAST_DISPATCH(function, ...)                                     \
  switch (::memad_fast::active_isa()) {                                        \
    case ::memad_fast::Isa::avx512:                                            \
      return ::memad_fast::avx512::function(__VA_ARGS__);                      \
    case ::memad_fast::Isa::avx2:                                              \
      return ::memad_fast::avx2::function(__VA_ARGS__);                        \
    default:                                                                   \
      return ::memad_fast::portable::function(__VA_ARGS__);                    \
  }
// Declares one kernel at every level.
#define MEMAD_FAST_DECLARE_KERNEL(declaration) \
  namespace portable { declaration; }          \
  namespace avx2 { declaration; }              \
  namespace avx512 { declaration; }
#else
#define MEMAD_FAST_DISPATCH(function, ...) return ::memad_fast::portable::function(__VA_ARGS__);
#define MEMAD_FAST_DECLARE_KERNEL(declaration) \
  namespace portable { declaration; }
#endif
