"""Ranks that plan the load of one checkpoint come to the same end, whichever of them fails, and where."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.config import CheckpointConfig
from resilience.errors import CorruptCopyError, LayoutMismatchError, ResilienceError
from resilience.reports import Resume
from resilience.restore import Restorer
from resilience.restore_staging import Peers, Stager
from resilience.testing.ranks import ThreadAgreements, on_all_ranks


@pytest.mark.parametrize("mode", ["assume_ok_unexpected", "raise_all"])
def test_when_one_rank_cannot_plan_its_load_all_are_at_the_same_place_afterwards(tmp_path: Path, mode: str) -> None:
    def work(group: ThreadAgreements) -> tuple[Any, list[bytes]]:
        outcome: Any = None
        stager = a_stager(tmp_path, group, mode, fails=group.rank == 1)
        try:
            outcome = stager.stage(SimpleNamespace())  # type: ignore[arg-type]
        except CorruptCopyError as error:
            outcome = error
        return outcome, group.gather(b"afterwards")

    (sound, heard), (failed, heard_too) = on_all_ranks(2, work)
    assert heard == heard_too == [b"afterwards", b"afterwards"]
    assert isinstance(failed, CorruptCopyError)
    with pytest.raises(LayoutMismatchError, match="another rank"):
        sound()


@pytest.mark.parametrize("where", ["obtain", "stage", "copy"])
def test_what_a_ranks_own_objects_raise_at_a_load_ends_the_start_of_all(where: str) -> None:
    def work(group: ThreadAgreements) -> None:
        def step(name: str) -> None:
            if name == where and group.rank == 1:
                raise TypeError

        def copy() -> Resume:
            step("copy")
            return Resume(3, 1, "persistent", 0.0)

        def stage(_: Any) -> Any:
            step("stage")
            return copy

        def obtain(*_: Any) -> Any:
            step("obtain")
            return [], stage

        chosen = SimpleNamespace(kind="shared", source="save", tier="persistent", save=None)
        plan: Any = SimpleNamespace(decision=SimpleNamespace(chosen=chosen), retrieval=None, assembly=None)
        nothing: Any = None
        restorer = Restorer(
            nothing, group, "", "", (), None, SimpleNamespace(obtain=obtain), nothing, nothing, nothing,  # type: ignore[arg-type]
            lambda *_, **__: None,
        )  # fmt: skip
        restorer._try(plan, nothing, 0, set())

    sound, failed = on_all_ranks(2, work)
    assert isinstance(failed, TypeError)
    assert isinstance(sound, ResilienceError)


def a_stager(folder: Path, group: ThreadAgreements, mode: str, *, fails: bool) -> Stager:
    reader: Any = SimpleNamespace(folder=folder, index={}, record=None, read=lambda _: None, close=lambda: None)
    chosen: Any = SimpleNamespace(weights_only=False, tier="persistent")
    peers = Peers(everyone=group)  # type: ignore[arg-type]
    config = CheckpointConfig(dist_ckpt_strictness=mode)
    stager = Stager(reader, chosen, config, lambda: None, group.rank, peers, None, lambda *_, **__: None)  # type: ignore[arg-type]
    stager._plan = cannot if fails else nothing_to_do  # type: ignore[method-assign]
    return stager


def cannot(_: Any) -> Any:
    raise CorruptCopyError("the values make no sense")


def nothing_to_do(_: Any) -> Any:
    return SimpleNamespace(asked=frozenset(), unexpected=frozenset(), parts=("model",), targets=(), base_targets=())
