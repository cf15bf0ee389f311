"""IdTable: what a dict of the live rows' ids would say."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memad_fast.index.ids import IdTable

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["own", "own", "counting"]), st.integers(0, 30), st.floats(0, 0.6), st.integers(0, 10**6)
    ),
    max_size=25,
)


@settings(max_examples=150, deadline=None)
@given(steps=STEPS)
def test_any_life(steps: list[tuple[str, int, float, int]]) -> None:
    table, known = IdTable(), {}
    oldest = row = following = 0
    for kind, count, removed, seed in steps:
        if kind == "own":
            ids = np.random.default_rng(seed).permutation(120)
            ids = np.array([i for i in ids.tolist() if i not in known][:count], dtype=np.int64)
            table.add(ids, row, oldest)
        else:
            first = max(following, 120)
            ids = np.arange(first, first + count)
            table.add_range(first, row, count, oldest)
        following = max([following, *(int(i) + 1 for i in ids)])
        known |= {int(i): row + at for at, i in enumerate(ids)}
        row += len(ids)
        oldest += round(removed * (row - oldest))
        known = {i: at for i, at in known.items() if at >= oldest}
        asked = np.arange(-3, following + 3)
        assert table.find(asked, oldest).tolist() == [known.get(i, -1) for i in asked.tolist()]


def test_ids_that_count_on_take_no_memory_and_others_16_bytes_each() -> None:
    table = IdTable()
    for first in range(0, 10**6, 1000):
        table.add_range(first, first, 1000, 0)
    assert table.nbytes == 0
    assert len(table._ranges) == 1
    for first in range(0, 50_000, 500):
        table.add(np.random.default_rng(first).permutation(500) + 10**7 + first, 10**6 + first, 0)
    assert table.nbytes == 16 * 50_000
    assert len(table._runs) < 10


def test_ids_of_removed_rows_are_forgotten_as_others_come() -> None:
    table = IdTable()
    for first in range(0, 100_000, 100):
        table.add(np.arange(first, first + 100), first, max(0, first - 1000))
    assert table.nbytes < 16 * 5000
