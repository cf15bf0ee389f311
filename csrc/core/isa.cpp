#include "core/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace memad_fast {
namespace {

constexpr int kAuto = -1;
std::atomic<int> forced{kAuto};

std::vector<Isa> detect() {
  std::vector<Isa> found{Isa::portable};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx2) found.push_back(Isa::avx2);
  if (avx512) found.push_back(Isa::avx512);
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
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "portable";
  }
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
