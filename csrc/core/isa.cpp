#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace memad_fast {
namespace {

constexpr int kAuto = -1;
std::atomic<int> forced{kAuto};

#if defined(__x86_64__) && defined(__linux__)
// Tiles can be used where the operating system saves them (XCR0, bits 17 and 18: their shapes and their data) and has granted
// this process their large state, which Linux does on request only. On Linux a grant implies the bits. They are read first all
// the same, as Intel's manual has it: whatever answers a system call in an emulator or a sandbox may not know this one.
bool amx_is_granted() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // there is such a register wherever AVX is supported
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// CPUID leaf 7: what __builtin_cpu_supports of some compilers does not name.
bool leaf7(unsigned subleaf, int reg, int bit) {
  unsigned r[4];
  if (!__get_cpuid_count(7, 0, &r[0], &r[1], &r[2], &r[3]) || subleaf > r[0]) return false;
  return __get_cpuid_count(7, subleaf, &r[0], &r[1], &r[2], &r[3]) && (r[reg] >> bit & 1u);
}
#endif

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (avx2) found.push_back(Isa::avx2);
#if defined(__linux__)
  constexpr int kEax = 0, kEdx = 3, kAvxVnni = 4, kAmxTile = 24, kAmxInt8 = 25;
  if (avx2 && leaf7(1, kEax, kAvxVnni)) found.push_back(Isa::avx2_vnni);
#endif
  if (avx512) found.push_back(Isa::avx512);
  if (avx512_vnni) found.push_back(Isa::avx512_vnni);
#if defined(__linux__)
  if (avx512_vnni && leaf7(0, kEdx, kAmxTile) && leaf7(0, kEdx, kAmxInt8) && amx_is_granted()) found.push_back(Isa::amx);
#endif
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(Isa::neon_dotprod);
#endif
  return found;
}

std::string known_names() {
  std::string names = "auto";
  for (Isa isa : supported_isas()) names += std::string(", ") + isa_name(isa);
  return names;
}

Isa by_name(const std::string& name, const char* source) {
  for (Isa isa : supported_isas())
    if (name == isa_name(isa)) return isa;
  throw std::invalid_argument(std::string(source) + ": expected one of " + known_names() +
                              " on this processor, got '" + name + "'");
}

Isa from_environment() {
  const char* name = std::getenv("MEMAD_FAST_ISA");
  if (name == nullptr || *name == '\0' || std::string(name) == "auto") return supported_isas().back();
  return by_name(name, "MEMAD_FAST_ISA");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx2_vnni:
      return "avx2_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::amx:
      return "amx";
    case Isa::neon_dotprod:
      return "neon_dotprod";
    case Isa::portable:
      break;
  }
  return "portable";
}

const std::vector<Isa>& supported_isas() {
  static const std::vector<Isa> levels = detect();
  return levels;
}

Isa active_isa() {
  const int level = forced.load(std::memory_order_relaxed);
  if (level != kAuto) return static_cast<Isa>(level);
  static const Isa chosen = from_environment();
  return chosen;
}

void set_isa(const std::string& name) {
  forced.store(name == "auto" ? kAuto : static_cast<int>(by_name(name, "isa")), std::memory_order_relaxed);
}

}  // namespace memad_fast
