"""The life of an index that keeps its rows, beside plain lists: what holds for every kind."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from remembered import Remembered, assert_same

from memad_fast.index import ExactIndex, FaissIndex


def integers(count: int, dim: int = 3) -> torch.Tensor:
    """Small ones: many ties, and sums without rounding."""
    return torch.randint(-2, 3, (count, dim)).float()


class StoredLife(RuleBasedStateMachine):
    """Adds, removes, saves and opens in any order. A kind says how it begins, merges, and what holds in between."""

    index: ExactIndex | FaissIndex
    expected: Remembered
    scratch: tempfile.TemporaryDirectory[str]
    path: Path
    saved: bool

    def begin_beside(self, index: ExactIndex | FaissIndex) -> None:
        self.index = index
        self.expected = Remembered(3, index.metric, index.capacity)
        self.saved = False

    def new_folder(self) -> Path:
        self.scratch = tempfile.TemporaryDirectory()
        self.path = Path(self.scratch.name) / "index"
        return self.path

    @rule(count=st.sampled_from([0, 1, 3, 40, 64, 130]), own_ids=st.booleans())
    def add(self, count: int, own_ids: bool) -> None:
        keys, values = integers(count), torch.randn(count, 2)
        ids = None
        if own_ids:  # some of rows that were removed
            ids = torch.randperm(2000)
            ids = ids[~torch.isin(ids, self.expected.ids)][:count]
        got = self.index.add(keys, values, ids)
        if ids is not None:
            assert torch.equal(got, ids)
        assert not torch.isin(got, self.expected.ids).any()
        self.expected.add(keys, got, values)

    @precondition(lambda self: len(self.expected.ids))
    @rule(share=st.floats(0, 1))
    def remove(self, share: float) -> None:
        n = round(share * len(self.index))
        self.index.remove_oldest(n)
        self.expected.remove_oldest(n)

    @precondition(lambda self: len(self.expected.ids))
    @rule(share=st.floats(0, 0.999))
    def refuse(self, share: float) -> None:
        known = self.expected.ids[int(share * len(self.expected.ids))]
        before = len(self.index)
        for keys, ids in ((torch.full((2, 3), torch.nan), None), (integers(2), torch.stack((known, known + 5000)))):
            with pytest.raises(ValueError):
                self.index.add(keys, torch.zeros(2, 2), ids)
        assert len(self.index) == before

    @rule()
    def save(self) -> None:
        self.index.save(self.path)
        self.saved = True

    @rule()
    def save_elsewhere(self) -> None:
        copy = self.path.with_name("copy")
        if self.index.path is not None:
            self.index.save(copy)
            assert_same(type(self.index).open(copy), self.expected)

    @precondition(lambda self: self.saved)
    @rule(mmap=st.booleans(), verify=st.sampled_from(["first_use", "now", "sizes"]))
    def reopen(self, mmap: bool, verify: str) -> None:
        self.save()
        self.index.close()
        self.index = type(self.index).open(self.path, mmap=mmap, verify=verify)

    @precondition(lambda self: len(self.expected.ids))
    @rule()
    def look_up(self) -> None:
        chosen = torch.randint(0, len(self.expected.ids), (6,))
        keys, ids, values = self.index.rows(self.expected.ids[chosen])
        assert torch.equal(keys, self.expected.keys[chosen])
        assert torch.equal(ids, self.expected.ids[chosen])
        assert torch.equal(values, self.expected.values[chosen])

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.close()
            self.scratch.cleanup()
