"""How a layout crosses from a device: in commands of bounded size that make up every byte. Here the device is the host.

`tests/cuda/test_crossing.py` has the same with a device and its streams.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.snapshot import device as crossing
from resilience.snapshot.arena import Arena
from resilience.snapshot.device import plan_crossing
from resilience.snapshot.sources import Sources
from tests.core.shards import FS, item, layout_of, random_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8, torch.float64]


@settings(max_examples=100)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=3), st.booleans()),
        min_size=1,
        max_size=25,
    ),
    piece=st.sampled_from([64, 1000, 4096, 1 << 20]),
    small=st.sampled_from([1, 100, 5000]),
    room=st.sampled_from([0, 500, 1 << 20]),
)
def test_every_byte_crosses_in_bounded_commands(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[Any], piece: int, small: int, room: int
) -> None:
    items = []
    for number, (dtype, shape, turned) in enumerate(shapes):
        tensor = random_bytes(dtype, shape, number)
        items.append(item(f"model/0/{number}", tensor.t() if turned and tensor.dim() == 2 else tensor))
    layout = layout_of(items)
    arena = Arena(FS.create_mapping(tmp_path_factory.mktemp("arena") / "arena", layout.nbytes))
    arena.use(layout)
    sources = Sources().of(items, layout).tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crossing, "_PIECE_BYTES", piece)
        patch.setattr(crossing, "_SMALL_BYTES", small)
        plan = plan_crossing(layout, sources, range(len(sources)))
    rows = [tensor[:1].nbytes for tensor in sources if not tensor.is_contiguous() and tensor.numel()]
    longest = max([piece, *rows, *(tensor.nbytes for tensor in sources if tensor.nbytes < small)])
    assert all(each.stop - each.start <= longest for each in plan._crossings)
    meeting_place = torch.empty(room, dtype=torch.uint8) if room else None
    for turn in range(3):  # views are made, are kept, are of other tensors
        if turn == 2:
            items = [item(each.key, each.tensor.clone()) for each in items]
            sources = Sources().of(items, layout).tensors
        for each in items:
            each.tensor.copy_(random_bytes(each.tensor.dtype, tuple(each.tensor.shape), 100 + turn))
        arena.content[layout.data_start : layout.values_start].fill_(255)
        plan.issue(arena.content, sources, meeting_place)
        for view, placed in zip(arena.views, layout.placed, strict=True):
            source = items[placed.piece.item].tensor.contiguous()
            assert torch.equal(view.view(-1).view(torch.uint8), source.view(-1).view(torch.uint8))


def test_thousands_of_small_tensors_cross_in_a_few_commands(tmp_path: Path) -> None:
    items = [item(f"model/0/{number:04d}", torch.randn(1000)) for number in range(5000)]
    layout = layout_of(items)
    plan = plan_crossing(layout, Sources().of(items, layout).tensors, range(len(items)))
    assert len(plan._crossings) == 1, "20 MB in pieces of 32"
    assert len(plan._crossings[0].cuts) == 5000
