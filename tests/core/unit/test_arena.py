"""An arena is used in order: a layout that fits, a fill, a seal; then its bytes are the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from resilience.snapshot.arena import Arena
from tests.core.shards import FS, copied, identity, item, layout_of, sealed


def arena_of(path: Path, nbytes: int) -> Arena:
    return Arena(FS.create_mapping(path, nbytes))


def test_an_arena_without_a_layout_is_neither_filled_nor_sealed(tmp_path: Path) -> None:
    arena = arena_of(tmp_path / "arena", 4096)
    for use in (
        lambda: arena.write_values(b"{}"),
        lambda: arena.seal(identity()),
    ):
        with pytest.raises(ValueError, match="no layout"):
            use()


def test_a_layout_of_another_size_is_refused(tmp_path: Path) -> None:
    arena = arena_of(tmp_path / "arena", 4096)
    with pytest.raises(ValueError, match="does not fit an arena of 4096"):
        arena.use(layout_of([item("w", torch.zeros(5000))]))


def test_a_re_used_arena_holds_the_new_save_and_nothing_of_the_old_one(tmp_path: Path) -> None:
    items = [item("model/0/w", torch.ones(100))]
    layout = layout_of(items, b"x" * 3000)
    arena = sealed(tmp_path / "arena", items, layout, b"x" * 3000)
    items[0].tensor.zero_()
    copied(items, arena)
    arena.write_values(b"{}")
    arena.seal(identity(values=b"{}"))
    fresh = sealed(tmp_path / "fresh", items, layout, b"{}")
    assert bytes(arena.mapped.view) == bytes(fresh.mapped.view)


def test_views_outlive_the_closing_of_their_arena(tmp_path: Path) -> None:
    items = [item("model/0/w", torch.ones(100))]
    arena = sealed(tmp_path / "arena", items, layout_of(items))
    segment = arena.segment(0, 100)
    arena.close()
    assert segment.sum() > 0
    assert arena.views == []
