"""The chosen interval is close to the best one that the full model knows, and inside its bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.cadence import best_interval, expected_goodput

SAVE = st.floats(0.001, 30)
STEP = st.floats(0.05, 20)
MTBF = st.floats(600, 1e6)


def test_young_s_formula_holds_where_failures_are_rare() -> None:
    assert best_interval(save_s=2, step_s=1, mtbf_s=40_000) == pytest.approx(400, abs=3)


def test_daly_s_terms_count_where_failures_are_frequent() -> None:
    assert best_interval(save_s=30, step_s=1, mtbf_s=600) == 170


@given(SAVE, STEP, MTBF)
def test_no_other_interval_loses_noticeably_less(save_s: float, step_s: float, mtbf_s: float) -> None:
    def goodput(steps: int) -> float:
        return expected_goodput(steps, save_s=save_s, step_s=step_s, mtbf_s=mtbf_s)

    chosen = best_interval(save_s=save_s, step_s=step_s, mtbf_s=mtbf_s)
    others = [max(1, round(chosen * factor)) for factor in (0.1, 0.3, 0.5, 0.8, 1.25, 2, 3, 10)]
    assert goodput(chosen) >= max(map(goodput, others)) - 0.003


@given(SAVE, STEP, MTBF, st.integers(1, 50), st.integers(0, 500))
def test_the_interval_stays_within_its_bounds(save_s: float, step_s: float, mtbf_s: float, low: int, more: int) -> None:
    steps = best_interval(save_s=save_s, step_s=step_s, mtbf_s=mtbf_s, shortest_steps=low, longest_steps=low + more)
    assert low <= steps <= low + more


@given(SAVE, SAVE, STEP, MTBF)
def test_dearer_saves_are_never_made_more_often(a: float, b: float, step_s: float, mtbf_s: float) -> None:
    cheap, dear = (best_interval(save_s=each, step_s=step_s, mtbf_s=mtbf_s) for each in sorted((a, b)))
    assert cheap <= dear


@given(st.integers(1, 10_000), SAVE, STEP, MTBF, st.floats(0, 1e5))
def test_goodput_is_a_share(steps: int, save_s: float, step_s: float, mtbf_s: float, restart_s: float) -> None:
    assert 0 <= expected_goodput(steps, save_s=save_s, step_s=step_s, mtbf_s=mtbf_s, restart_s=restart_s) <= 1
