"""Hyperparameters of another program's groups: who takes which, and what is left as it is."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.planning.foreign_groups import saved_groups, saved_step, take_groups

DECAYING = {"lr": 0.5, "weight_decay": 0.1, "betas": (0.9, 0.95), "step": 7, "wd_mult": 1.0, "lr_mult": 1.0}
FLAT = {**DECAYING, "weight_decay": 0.0, "wd_mult": 0.0, "step": 6}
SAVED = [{**each, "is_expert_parallel": False, "is_decoupled_lr": False} for each in (DECAYING, FLAT)]


@pytest.mark.parametrize(
    "stored",
    [
        {"param_groups": SAVED},
        {"optimizer": {"param_groups": SAVED}, "param_state_sharding_type": "fully_reshardable"},
        {0: {"optimizer": {"param_groups": SAVED[:1]}}, 1: {"optimizer": {"param_groups": SAVED[1:]}}},
        [{"param_groups": SAVED[:1]}, {"param_groups": SAVED[1:]}],
    ],
)
def test_groups_are_found_in_every_nesting(stored: Any) -> None:
    assert saved_groups(stored) == SAVED


def test_a_group_takes_from_those_that_decay_as_it_does() -> None:
    live = [
        {"lr": 1.0, "weight_decay": 0.01, "fused": None, "params": []},
        {"lr": 1.0, "weight_decay": 0, "params": []},
    ]
    first, second = take_groups(live, SAVED)
    assert first.values == {"lr": 0.5, "weight_decay": 0.1}
    assert second.values == {"lr": 0.5, "weight_decay": 0.0}
    assert (first.step, second.step) == (7, 6)


def test_megatrons_own_multipliers_count_more() -> None:
    live = {"lr": 1.0, "weight_decay": 0.3, "betas": (0.1, 0.2), **{k: SAVED[1][k] for k in ("wd_mult", "lr_mult")}}
    (taken,) = take_groups([{**live, "is_expert_parallel": False, "is_decoupled_lr": False}], SAVED)
    assert taken.values == {"lr": 0.5, "weight_decay": 0.0, "betas": (0.9, 0.95)}


def test_a_group_whose_decay_no_scheduler_has_multiplied_out_yet_does_not_decay() -> None:
    fresh = {"param_groups": [SAVED[0], {**SAVED[1], "weight_decay": 0.1}]}
    assert [group["weight_decay"] for group in saved_groups(fresh)] == [0.1, 0.0]


def test_what_candidates_differ_in_is_disputed_and_without_any_nothing_is_taken_but_the_step() -> None:
    (taken,) = take_groups([{"lr": 1.0, "weight_decay": 0.2}], [SAVED[0], {**SAVED[0], "lr": 0.25}])
    assert (taken.values, taken.disputed) == ({"weight_decay": 0.1}, ("lr",))
    (taken,) = take_groups([{"lr": 1.0, "weight_decay": 0.0}], [SAVED[0], {**SAVED[0], "lr": 0.25}])
    assert (taken.values, taken.alike, taken.step) == ({}, False, 7)


def test_the_common_step_is_found_beside_the_groups() -> None:
    assert saved_step({"optimizer": {"state": {"common_step": 5.0}, "param_groups": []}}) == 5
    assert saved_step({"param_groups": []}) is None
    assert saved_step(None) is None


def test_what_is_no_plain_value_is_left_out_and_no_nesting_is_followed_for_ever() -> None:
    odd = {"lr": [[1.0]], "betas": (0.9, "x"), "eps": 1e-8, 7: 1, "step": -1, "weight_decay": {"a": 1}}
    assert saved_groups({"param_groups": [odd, "none"]}) == [{"eps": 1e-8, "step": -1}]
    (taken,) = take_groups([{"lr": 1.0, "eps": 1.0, "weight_decay": 0.1}], saved_groups({"param_groups": [odd]}))
    assert (taken.values, taken.step) == ({"eps": 1e-8}, None)
    nested: Any = {"param_groups": [odd]}
    for _ in range(5000):
        nested = {"optimizer": nested}
    assert saved_groups(nested) == []
    assert saved_step(nested) is None
