"""Memories as modules: each owns its items and reads them through one op of ``memad_fast.ops``."""
