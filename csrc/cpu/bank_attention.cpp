#include "cpu/bank_attention.h"

#include "core/isa.h"

namespace memad_fast {

MEMAD_FAST_DECLARE_KERNEL(void bank_attention(const BankAttention& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void bank_attention_backward(const BankAttentionBackward& args, const ThreadLoop& loop))
MEMAD_FAST_DECLARE_KERNEL(void bank_attention_stats(const BankAttentionStats& args, const ThreadLoop& loop))

void bank_attention(const BankAttention& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(bank_attention, args, loop)
}

void bank_attention_backward(const BankAttentionBackward& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(bank_attention_backward, args, loop)
}

void bank_attention_stats(const BankAttentionStats& args, const ThreadLoop& loop) {
  MEMAD_FAST_DISPATCH(bank_attention_stats, args, loop)
}

}  // namespace memad_fast
