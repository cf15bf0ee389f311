"""Memories as modules: each owns its items and reads them through one op of ``memad_fast.ops``."""

from memad_fast.memory.coreset import greedy_coreset
from memad_fast.memory.hierarchical_memory import HierarchicalMemory
from memad_fast.memory.memory_queue import MemoryQueue
from memad_fast.memory.memory_unit import MemoryUnit
from memad_fast.memory.partition_memory_bank import PartitionMemoryBank
from memad_fast.memory.space_aware_memory import SpaceAwareMemory
from memad_fast.memory.structure_texture_memory import StructureTextureIndex, StructureTextureMemory

__all__ = [
    "HierarchicalMemory",
    "MemoryQueue",
    "MemoryUnit",
    "PartitionMemoryBank",
    "SpaceAwareMemory",
    "StructureTextureIndex",
    "StructureTextureMemory",
    "greedy_coreset",
]
