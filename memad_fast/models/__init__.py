"""The detectors: thin networks over ``memad_fast.memory`` and ``memad_fast.ops``."""
