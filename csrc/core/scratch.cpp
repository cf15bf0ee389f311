#include "core/scratch.h"

#include <new>

namespace memad_fast {
namespace {
constexpr std::align_val_t kAlignment{64};
}

Scratch::Scratch(std::size_t bytes) : data_(::operator new(bytes < 64 ? 64 : bytes, kAlignment)) {}
Scratch::~Scratch() { ::operator delete(data_, kAlignment); }

}  // namespace memad_fast
