"""The ops: one file each, holding contract, checks, reference, fake kernel and gradient.

Every public function takes torch tensors, checks them, and hands them to the backend that serves the call
(see ``memad_fast._backend``).
"""

from memad_fast.ops.bank_attention import BankAttentionStats, bank_attention, bank_attention_stats
from memad_fast.ops.fifo_write_ import fifo_write_
from memad_fast.ops.gumbel_topk import gumbel_topk
from memad_fast.ops.histogram_correction import histogram_correction
from memad_fast.ops.nearest_keys import NearestKeysStats, nearest_keys, nearest_keys_stats
from memad_fast.ops.nearest_keys_merge_ import nearest_keys_merge_
from memad_fast.ops.prepare_keys import PreparedKeys, prepare_keys
from memad_fast.ops.ssim import ssim_loss, ssim_map
from memad_fast.ops.stcm_lookup import stcm_lookup

__all__ = [
    "BankAttentionStats",
    "NearestKeysStats",
    "PreparedKeys",
    "bank_attention",
    "bank_attention_stats",
    "fifo_write_",
    "gumbel_topk",
    "histogram_correction",
    "nearest_keys",
    "nearest_keys_merge_",
    "nearest_keys_stats",
    "prepare_keys",
    "ssim_loss",
    "ssim_map",
    "stcm_lookup",
]
