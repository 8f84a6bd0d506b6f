"""What crosses from the device into an arena is what lay there, in whatever pieces it goes."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.errors import SaveFailedError
from resilience.snapshot import device as crossing
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying, Part
from resilience.snapshot.page_lock import page_lock
from resilience.snapshot.sources import Sources
from resilience.state.items import Item
from tests.core.shards import FS, item, layout_of, random_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8,
          torch.float8_e4m3fn, torch.float64]  # fmt: skip


def on_device(key: str, tensor: torch.Tensor) -> Item:
    return item(key, tensor.to("cuda"))


def arena_for(path: Path, items: list[Item]) -> Arena:
    layout = layout_of(items)
    path.unlink(missing_ok=True)
    arena = Arena(FS.create_mapping(path, layout.nbytes))
    arena.use(layout)
    return arena


def check(arena: Arena, items: list[Item]) -> None:
    assert arena.layout is not None
    for view, placed in zip(arena.views, arena.layout.placed, strict=True):
        source = items[placed.piece.item].tensor.cpu().contiguous()
        assert torch.equal(view.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8)), placed.piece.key


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3), st.booleans()),
                    min_size=1, max_size=25),
    piece=st.sampled_from([64, 1000, 4096, 1 << 20]),
    small=st.sampled_from([1, 100, 5000]),
)  # fmt: skip
def test_any_tensors_in_any_pieces(
    memory_mount: Path, shapes: list[tuple[torch.dtype, list[int], bool]], piece: int, small: int
) -> None:
    items = []
    for number, (dtype, shape, turned) in enumerate(shapes):
        tensor = random_bytes(dtype, shape, number).to("cuda")
        items.append(item(f"model/0/{number}", tensor.t() if turned and tensor.dim() == 2 else tensor))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossing, "_PIECE_BYTES", max(piece, 64))
        patch.setattr(crossing, "_SMALL_BYTES", small)
        arena = arena_for(memory_mount / "arena", items)
        assert arena.layout is not None
        Copying().start([Part(arena, arena.layout, Sources().of(items, arena.layout))], (), lambda: None)
        check(arena, items)
        arena.close()


def test_device_and_host_tensors_lie_in_one_arena(memory_mount: Path) -> None:
    items = [on_device("model/0/a", torch.randn(3000, 1000)), item("model/0/b", torch.randn(500)),
             *(on_device(f"model/0/s{n}", torch.randn(11)) for n in range(500))]  # fmt: skip
    arena = arena_for(memory_mount / "arena", items)
    assert arena.layout is not None
    Copying().start([Part(arena, arena.layout, Sources().of(items, arena.layout))], (), lambda: None)
    check(arena, items)


def test_the_arena_s_own_pages_are_locked_until_it_is_closed(memory_mount: Path) -> None:
    items = [on_device("model/0/a", torch.randn(1000, 1000))]
    arena = arena_for(memory_mount / "arena", items)
    assert arena.layout is not None
    assert not arena.content.is_pinned()
    Copying().start([Part(arena, arena.layout, Sources().of(items, arena.layout))], (), lambda: None)
    assert arena.pages_locked
    assert arena.content.is_pinned()
    content = arena.content
    arena.close()
    assert not content.is_pinned()


def test_an_arena_that_is_dropped_unlocks_its_pages_and_a_refused_lock_spoils_no_later_kernel(
    memory_mount: Path,
) -> None:
    items = [on_device("model/0/a", torch.randn(1000, 1000))]
    arena = arena_for(memory_mount / "arena", items)
    arena.lock_pages(page_lock)
    with pytest.raises(RuntimeError, match="already mapped"):
        page_lock(arena.content)
    torch.ones(1, device="cuda").add_(1)
    content = arena.content
    del arena
    gc.collect()
    assert not content.is_pinned()


def test_where_pages_cannot_be_locked_it_is_said_once_and_the_copy_is_right(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(content: torch.Tensor) -> None:
        raise RuntimeError("no more pages may be locked")

    told: list[str] = []
    monkeypatch.setattr("resilience.snapshot.copying.page_lock", refuse)
    copying = Copying(tell=lambda event, **fields: told.append(fields["what"]))
    for name in ("one", "two"):
        items = [on_device("model/0/a", torch.randn(1000, 1000))]
        arena = arena_for(memory_mount / name, items)
        assert arena.layout is not None
        copying.start([Part(arena, arena.layout, Sources().of(items, arena.layout))], (), lambda: None)
        check(arena, items)
    assert len(told) == 1
    assert "no more pages" in told[0]


def test_a_device_without_room_fails_the_save_and_nothing_else(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    items = [on_device(f"model/0/{n}", torch.randn(100)) for n in range(10)]
    arena = arena_for(memory_mount / "arena", items)
    assert arena.layout is not None
    part = Part(arena, arena.layout, Sources().of(items, arena.layout))
    copying = Copying()
    with monkeypatch.context() as patch:
        patch.setattr(crossing.torch, "empty", full)
        with pytest.raises(SaveFailedError, match="no room"):
            copying.start([part], (), lambda: None)
    copying.start([part], (), lambda: None)
    check(arena, items)


def test_what_was_enqueued_before_the_boundary_is_in_the_snapshot_and_what_came_after_is_not(
    memory_mount: Path,
) -> None:
    tensor = torch.zeros(4 << 20, device="cuda")
    items = [item("model/0/a", tensor)]
    arena = arena_for(memory_mount / "arena", items)
    assert arena.layout is not None
    copying, part = Copying(), Part(arena, arena.layout, Sources().of(items, arena.layout))
    for number in range(1, 6):
        torch.cuda._sleep(50_000_000)  # the device is behind the host
        tensor.fill_(number)
        copying.start([part], (), lambda: None)
        tensor.fill_(-1)
        assert arena.views[0].unique().tolist() == [number]


def test_nothing_waits_for_the_whole_device(memory_mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a device-wide synchronise")

    items = [on_device(f"model/0/{n}", torch.randn(1000, n + 1)) for n in range(10)]
    arena = arena_for(memory_mount / "arena", items)
    assert arena.layout is not None
    elsewhere = torch.cuda.Stream()
    monkeypatch.setattr(torch.cuda, "synchronize", refuse)
    copying, part = Copying(), Part(arena, arena.layout, Sources().of(items, arena.layout))
    copying.start([part], (), lambda: None)  # registers the pages, which may wait for all
    with torch.cuda.stream(elsewhere):
        torch.cuda._sleep(2_000_000_000)  # a second of somebody else's
        done = torch.cuda.Event()
        done.record(elsewhere)
    copying.start([part], (), lambda: None)
    assert not done.query(), "the snapshot waited for a stream that has nothing to do with it"
    check(arena, items)
