from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memad_fast._ledger import DIED, Ledger


def test_an_image_that_two_workers_died_at_is_known_with_the_last_reason() -> None:
    ledger = Ledger(workers=2)
    assert ledger.enter(32) == (1, {})
    assert ledger.enter(32) == (2, {})
    ledger.at(32, 40)
    ledger.failing(32, "ValueError: no")
    assert ledger.enter(32) == (3, {40: "ValueError: no"})
    ledger.at(32, 41)
    assert ledger.enter(32) == (4, {40: "ValueError: no", 41: DIED})


def test_a_worker_that_dies_between_images_is_held_against_none() -> None:
    ledger = Ledger(workers=1)
    ledger.enter(0)
    ledger.enter(0)
    ledger.at(0, 1)
    ledger.at(0, None)
    assert ledger.enter(0) == (3, {})


def test_batches_are_apart_and_those_that_arrived_are_forgotten() -> None:
    ledger = Ledger(workers=2)
    ledger.enter(0)
    ledger.enter(0)
    ledger.at(0, 0)
    assert ledger.enter(32) == (1, {})
    ledger.arrived(0)
    ledger.arrived(0)
    assert ledger.enter(0) == (1, {})


@given(loads=st.integers(0, 50), workers=st.integers(1, 9), deaths=st.integers(0, 9))
def test_deaths_while_loading_are_counted_and_loads_that_ended_well_are_not(
    loads: int, workers: int, deaths: int
) -> None:
    ledger = Ledger(workers)
    for _ in range(loads):
        assert ledger.begin_loading() == 0
        ledger.has_loaded()
    for _ in range(deaths + workers - 1):
        ledger.begin_loading()
    assert ledger.begin_loading() == deaths
