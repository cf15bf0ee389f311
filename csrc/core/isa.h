// Which instruction set the kernels of this call use: found once, overridden by MEMAD_FAST_ISA or set_isa.
//
// A kernel file (csrc/cpu/<op>_kernel.cpp) is compiled once per vector width (portable, avx2, avx512), each time into a
// namespace of its own and with that level's compiler flags. Levels that only add dot products of bytes share the kernels
// of their width and differ in the micro-kernels of csrc/cpu/nearest_keys_dot*.cpp. Nothing outside these files is
// compiled with their flags, so no wider instruction can leak into code that an older processor runs.
#pragma once

#include <string>
#include <vector>

namespace memad_fast {

enum class Isa : int {
  portable,      // whatever the compiler's baseline has: SSE2 on x86-64, NEON on aarch64
  avx2,          // AVX2, FMA, F16C (Haswell, Zen and later)
  avx2_vnni,     // AVX2 with AVX-VNNI (Alder Lake, Zen 5 and later)
  avx512,        // AVX-512 F, BW, DQ, VL (Skylake-X, Zen 4 and later)
  avx512_vnni,   // AVX-512 with VNNI (Cascade Lake, Zen 4 and later)
  amx,           // AVX-512 with VNNI, and AMX tiles of int8 (Sapphire Rapids and later)
  neon_dotprod,  // NEON with dot products (Armv8.2 and later)
};

const char* isa_name(Isa isa);

// The levels this build has and this processor can run, lowest first. Never empty.
const std::vector<Isa>& supported_isas();

// The level in force. Throws std::invalid_argument if MEMAD_FAST_ISA names one that cannot run here.
Isa active_isa();

// Force a level by name; "auto" returns to the highest. Throws std::invalid_argument.
void set_isa(const std::string& name);

}  // namespace memad_fast

// Calls memad_fast::<width>::function(...) for the level in force: once per op call, outside every loop.
#if defined(__x86_64__)
#define MEMAD_FAST_DISPATCH(function, ...)                                     \
  switch (::memad_fast::active_isa()) {                                        \
    case ::memad_fast::Isa::avx512:                                            \
    case ::memad_fast::Isa::avx512_vnni:                                       \
    case ::memad_fast::Isa::amx:                                               \
      return ::memad_fast::avx512::function(__VA_ARGS__);                      \
    case ::memad_fast::Isa::avx2:                                              \
    case ::memad_fast::Isa::avx2_vnni:                                         \
      return ::memad_fast::avx2::function(__VA_ARGS__);                        \
    default:                                                                   \
      return ::memad_fast::portable::function(__VA_ARGS__);                    \
  }
// Declares one kernel at every width.
#define MEMAD_FAST_DECLARE_KERNEL(declaration) \
  namespace portable { declaration; }          \
  namespace avx2 { declaration; }              \
  namespace avx512 { declaration; }
#else
#define MEMAD_FAST_DISPATCH(function, ...) return ::memad_fast::portable::function(__VA_ARGS__);
#define MEMAD_FAST_DECLARE_KERNEL(declaration) \
  namespace portable { declaration; }
#endif
