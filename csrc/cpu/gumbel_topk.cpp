#include "cpu/gumbel_topk.h"

#include "core/isa.h"
#include "cpu/slot_lists.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void gumbel_topk(const GumbelTopk& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(
    void gumbel_topk_backward(const GumbelTopkBackward& args, const Choices& choices, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void philox4x32(const uint32_t* counter, int64_t key, uint32_t* words))
MEMAD_FAST_DECLARE_KERNEL(
    void gumbel_noise(const uint32_t* words, int64_t count, float* low, float* noise, float* high))

void gumbel_topk(const GumbelTopk& args, const ThreadLoop& loop) { MEMAD_FAST_DISPATCH(gumbel_topk, args, loop) }

void gumbel_topk_backward(const GumbelTopkBackward& args, const ThreadLoop& loop) {
  const SlotLists lists(args.indices, args.query.rows * args.k, args.memory.rows);
  const Choices choices{lists.start.data(), lists.slots.data()};
  MEMAD_FAST_DISPATCH(gumbel_topk_backward, args, choices, loop)
}

void philox4x32(const uint32_t* counter, int64_t key, uint32_t* words) {
  MEMAD_FAST_DISPATCH(philox4x32, counter, key, words)
}

void gumbel_noise(const uint32_t* words, int64_t count, float* low, float* noise, float* high) {
  MEMAD_FAST_DISPATCH(gumbel_noise, words, count, low, noise, high)
}

}  // namespace memad_fast
