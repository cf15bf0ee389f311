// The thread loop that every CPU kernel runs on.
//
// A kernel never starts threads itself: it is handed a ThreadLoop by its binding. The torch binding
// passes torch's own intra-op pool (so torch.set_num_threads holds and nothing is oversubscribed), the
// NumPy binding passes a small pool of its own.
//
// Rule for kernels: the result must not depend on `threads` or on how the range is cut. So each index of
// a loop writes its own output, and sums over indices are made in a fixed order, never "per thread".
#pragma once

#include <cstdint>
#include <type_traits>

namespace memad_fast {

struct ThreadLoop {
  using Body = void (*)(int64_t begin, int64_t end, const void* context);
  using Run = void (*)(int64_t begin, int64_t end, int64_t grain, Body body, const void* context);

  Run run;      // calls body on disjoint pieces that cover [begin, end), from several threads
  int threads;  // how many threads `run` may use; only for choosing block sizes

  // body(begin, end) on pieces of [0, count) of at least `grain` indices each.
  template <class F>
  void operator()(int64_t count, int64_t grain, const F& body) const {
    if (count <= 0) return;
    if (threads <= 1 || count <= grain) {
      body(int64_t{0}, count);
      return;
    }
    run(
        0, count, grain < 1 ? 1 : grain,
        [](int64_t begin, int64_t end, const void* context) {
          (*static_cast<const std::remove_reference_t<F>*>(context))(begin, end);
        },
        &body);
  }
};

}  // namespace memad_fast
