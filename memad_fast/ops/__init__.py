"""The ops: one file each, holding contract, checks, reference, fake kernel and gradient.

Every public function takes torch tensors, checks them, and hands them to the backend that serves the call
(see ``memad_fast._backend``).
"""

from memad_fast.ops.histogram_correction import histogram_correction

__all__ = ["histogram_correction"]
