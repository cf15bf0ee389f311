"""Ages: what a list of the rows' numbers would say."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memad_fast.index.ages import Ages


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 4), st.integers(0, 3), st.floats(0, 1), st.booleans()),
        max_size=15,
    )
)
def test_any_life(steps: list[tuple[int, int, int, float, bool]]) -> None:
    """Rows before this shard's in a call, its own, those after; a share that is then removed; a call taken back."""
    ages, numbers, following, oldest = Ages(), [], 0, 0
    for before, own, after, removed, taken_back in steps:
        runs = len(ages)
        if own:
            ages.append(len(numbers), following + before)
        if taken_back:
            ages.shrink_to(runs)
            continue
        numbers += range(following + before, following + before + own)
        following += before + own + after
        oldest += round(removed * (following - oldest))
        here = sum(number < oldest for number in numbers)
        assert ages.first_from(oldest, len(numbers)) == here
        ages.forget_before(here)
        ages = Ages(**ages.tensors())
        live = torch.arange(here, len(numbers))
        assert ages.over_all(live).tolist() == numbers[here:]
        assert ages.over_all(torch.tensor([[-1]])).tolist() == [[-1]]
        for number in range(oldest, following + 2):
            assert ages.first_from(number, len(numbers)) == sum(known < number for known in numbers)
        for begin in range(here, len(numbers)):
            listed = [n + i for _, n, count in ages.runs(begin, len(numbers)) for i in range(count)]
            assert listed == numbers[begin:]


def test_rows_that_follow_each_other_over_all_shards_are_one_run() -> None:
    ages = Ages()
    for first in range(0, 1000, 10):
        ages.append(first, first)
    assert len(ages) == 1
    ages.append(1000, 2000)
    ages.append(1010, 2010)
    assert len(ages) == 2


def test_runs_of_removed_rows_are_forgotten() -> None:
    ages = Ages()
    for call in range(100):
        ages.append(10 * call, 20 * call)
    ages.forget_before(955)
    assert len(ages) == 5
    ages.forget_before(10**6)
    assert len(ages) == 1
