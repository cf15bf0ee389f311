"""Large memories behind one small interface (``Index``): exact in a quarter of the RAM, on files that survive crashes.

base.py          the interface
exact.py         ExactIndex: the exact search over chunks
faiss_index.py   FaissIndex: FAISS, with the original rows behind it
kinds.py         which kind a word or a folder asks for
stored.py        what both have in common: rows, ids and values
chunks.py        the pieces they keep rows in
ids.py           which row has an id
files.py         the folder of an index: parts, manifest, lock
sharded.py       ShardedIndex: rows on several processes and machines
ranks.py         what these tell each other
ages.py          how old a row is among those of all
"""

from memad_fast.index.base import Found, Index, IndexStats
from memad_fast.index.exact import ExactIndex
from memad_fast.index.faiss_index import FaissIndex
from memad_fast.index.files import FolderInUseError, IndexFileError
from memad_fast.index.kinds import make_index, open_index
from memad_fast.index.sharded import ShardedIndex
from memad_fast.index.sizes import Estimate
from memad_fast.index.stored import Rows

__all__ = [
    "Estimate",
    "ExactIndex",
    "FaissIndex",
    "FolderInUseError",
    "Found",
    "Index",
    "IndexFileError",
    "IndexStats",
    "Rows",
    "ShardedIndex",
    "make_index",
    "open_index",
]
