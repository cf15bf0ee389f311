// Per-call scratch memory for kernels: 64-byte aligned, freed at the end of the scope. Out of line, so that
// kernel files compiled with wide instruction sets instantiate nothing from the standard library.
#pragma once

#include <cstddef>

namespace memad_fast {

class Scratch {
 public:
  explicit Scratch(std::size_t bytes);  // throws std::bad_alloc
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <class T>
  T* as() const { return static_cast<T*>(data_); }

 private:
  void* data_;
};

}  // namespace memad_fast
