"""A snapshot is a file: what lies where, who can read it, and what a reader makes of anything else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from resilience.errors import CorruptCopyError
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying, Part
from resilience.snapshot.layout import VALUES_KEY
from resilience.snapshot.loader import open_shard
from resilience.snapshot.sources import Sources
from resilience.state.tensors import DTYPES, byte_view
from resilience.stores.shard_file import ITEM_BYTES, check_header, read_header
from tests.core.shards import FS, SAVE, item, layout_of, random_bytes, record_of, sealed

ALL_DTYPES = sorted(DTYPES.values(), key=str)
NAMED = {torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint16}


def every_dtype() -> list[Any]:
    """A matrix, a scalar and an empty tensor of every dtype that torch can copy, in odd sizes."""
    items = []
    for number, dtype in enumerate(ALL_DTYPES):
        name = str(dtype).removeprefix("torch.")
        items.append(item(f"model/0/{name}", random_bytes(dtype, (3, 5), number)))
        items.append(item(f"model/0/{name}.scalar", random_bytes(dtype, (), number)))
        items.append(item(f"model/0/{name}.empty", random_bytes(dtype, (0, 4), number)))
    return items


def test_every_dtype_comes_back_from_a_file_that_safetensors_opens(tmp_path: Path) -> None:
    items = every_dtype()
    arena = sealed(tmp_path / "shard", items, layout_of(items))
    header = read_header(arena.mapped.view, "shard")
    views = dict(zip((placed.piece.key for placed in arena.layout.placed), arena.views, strict=True))  # type: ignore[union-attr]
    with safe_open(tmp_path / "shard", "pt") as opened:
        assert set(opened.keys()) == {each.key for each in items} | {VALUES_KEY}
        for each in items:
            assert torch.equal(byte_view(views[each.key]), byte_view(each.tensor)), each.key
            assert header.pieces[each.key].shape == each.global_shape
            if each.tensor.dtype in NAMED:
                seen = opened.get_tensor(each.key)
                assert seen.dtype == each.tensor.dtype
                assert torch.equal(byte_view(seen), byte_view(each.tensor)), each.key
            else:
                assert byte_view(opened.get_tensor(each.key)).tolist() == byte_view(each.tensor).tolist()


def test_every_dtype_that_can_be_stored_can_be_read() -> None:
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {
        name: nbytes for name, nbytes in ITEM_BYTES.items() if name in DTYPES
    }


def test_tensors_are_aligned_and_lie_without_gaps(tmp_path: Path) -> None:
    layout = layout_of(every_dtype())
    position = layout.data_start
    assert position % 4096 == 0
    for placed in layout.placed:
        assert placed.start == position
        assert placed.start % placed.piece.dtype.itemsize == 0
        position += placed.piece.nbytes
    assert layout.values_start == position


def test_every_save_of_one_layout_has_the_same_length_whatever_its_numbers() -> None:
    layout = layout_of(every_dtype())
    short = layout.header(_identity(1))
    long = layout.header(_identity((1 << 53) - 1))
    assert len(short) == len(long) == layout.data_start


def _identity(number: int) -> Any:
    from resilience.snapshot.layout import ShardIdentity

    return ShardIdentity("r" * 128, "f" * 32, number >> 13, number, 16383, 16384, 1 << 40)


def test_strided_sources_land_contiguous(tmp_path: Path) -> None:
    base = torch.arange(60.0).reshape(6, 10)
    items = [item("model/0/t", base.t()), item("model/0/s", base[::2, 1::3]), item("model/0/n", -base)]
    arena = sealed(tmp_path / "shard", items, layout_of(items))
    for view, placed in zip(arena.views, arena.layout.placed, strict=True):  # type: ignore[union-attr]
        assert view.is_contiguous()
        assert torch.equal(view, items[placed.piece.item].tensor)


def test_the_copier_sees_tensors_that_were_replaced_or_moved(tmp_path: Path) -> None:
    tensors = [torch.zeros(4, 2), torch.zeros(3)]
    items = [item("model/0/w", tensors[0]), item("model/0/b", tensors[1])]
    layout = layout_of(items, parts=2, part=0)  # cut into rows: the views of them are cached
    arena = Arena(FS.create_mapping(tmp_path / "arena", layout.nbytes))
    arena.use(layout)
    sources, copying = Sources(), Copying()

    def copy() -> None:
        copying.start([Part(arena, layout, sources.of(items, layout))], (), lambda: None)

    copy()
    tensors[0].data = torch.ones(4, 2)  # the same object, other memory
    items[0] = item("model/0/w", tensors[0])
    items[1] = item("model/0/b", torch.full((3,), 2.0))
    copy()
    seen = {placed.piece.key: view.unique().tolist() for placed, view in zip(layout.placed, arena.views, strict=True)}
    assert seen.get("model/0/w", [1.0]) == [1.0]
    assert seen.get("model/0/b", [2.0]) == [2.0]
    assert seen


@given(
    shapes=st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=6),
    parts=st.integers(1, 5),
)
def test_the_shards_of_a_group_hold_every_row_of_what_they_share_once(shapes: list[list[int]], parts: int) -> None:
    items = [item(f"model/0/{number}", torch.zeros(shape)) for number, shape in enumerate(shapes)]
    layouts = [layout_of(items, part=part, parts=parts) for part in range(parts)]
    for number, each in enumerate(items):
        pieces = [placed.piece for layout in layouts for placed in layout.placed if placed.piece.item == number]
        if not each.tensor.dim() or not each.tensor.numel():
            assert [piece.shape for piece in pieces] == [each.global_shape], "stored whole, once"
            continue
        rows = [row for piece in pieces for row in range(piece.offsets[0], piece.offsets[0] + piece.shape[0])]
        assert sorted(rows) == list(range(each.tensor.shape[0]))


# -- reading what may be anything --------------------------------------------------------------------------------------


def _good(tmp_path: Path, values: bytes = b'{"a":1}') -> bytes:
    items = [item("model/0/w", torch.arange(6.0).reshape(2, 3)), item("rng/t", torch.zeros(4, dtype=torch.uint8))]
    arena = sealed(tmp_path / "good", items, layout_of(items, values), values)
    content = bytes(arena.mapped.view)
    arena.close()
    (tmp_path / "good").unlink()
    return content


def test_a_whole_shard_is_read_as_it_was_written(tmp_path: Path) -> None:
    content = _good(tmp_path)
    header = read_header(memoryview(content), "shard")
    assert (header.run_id, header.save, header.owner, header.world_size, header.group) == ("run", SAVE, 0, 1, (0,))
    start, stop = header.values
    assert content[start:stop] == b'{"a":1}'
    check_header(header, record_of(content), "shard")


@pytest.mark.parametrize(
    "field", [{"owner": 0, "world_size": 2}, {"run_id": "other"}, {"save": SAVE.__class__(8, 2, SAVE.attempt)}]
)
def test_a_shard_whose_record_speaks_of_another_save_is_no_copy(tmp_path: Path, field: dict[str, Any]) -> None:
    content = _good(tmp_path)
    path = tmp_path / "shard"
    path.write_bytes(content)
    with pytest.raises(CorruptCopyError, match="its header says"):
        open_shard(path, FS, record_of(content, **field))


@settings(max_examples=300)
@given(data=st.data())
def test_any_change_of_a_header_is_a_corrupt_copy_or_reads_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(_GOOD.get(tmp_path_factory))
    size = int.from_bytes(content[:8], "little")
    body = content[8 : 8 + size].rstrip()
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(body) + 7))
        content[place] = data.draw(st.integers(0, 255))
    assert _refused_or_within_the_file(bytes(content))


@settings(max_examples=300)
@given(
    header=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    )
)
def test_any_json_for_a_header_is_a_corrupt_copy(header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(CorruptCopyError):
        read_header(memoryview(len(text).to_bytes(8, "little") + text + bytes(64)), "shard")


@settings(max_examples=300)
@given(data=st.data())
def test_any_numbers_in_the_index_are_a_corrupt_copy_or_read_within_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = _GOOD.get(tmp_path_factory)
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + size])
    metadata = fields["__metadata__"]
    index = json.loads(metadata["index"])
    odd = st.integers(-3, 40) | st.integers(-(1 << 70), 1 << 70) | st.none() | st.text(max_size=3) | st.just([])
    entry = data.draw(st.sampled_from(index["items"]))
    where = data.draw(st.integers(1, len(entry) - 1))
    if isinstance(entry[where], list) and entry[where]:
        entry[where][data.draw(st.integers(0, len(entry[where]) - 1))] = data.draw(odd)
    else:
        entry[where] = data.draw(odd)
    tensor = fields[data.draw(st.sampled_from([key for key in fields if key != "__metadata__"]))]
    if data.draw(st.booleans()):
        tensor["data_offsets"][data.draw(st.integers(0, 1))] = data.draw(odd)
    metadata["index"] = json.dumps(index)
    text = json.dumps(fields).encode()
    assume(len(text) <= size)
    assert _refused_or_within_the_file(content[:8] + text.ljust(size, b" ") + content[8 + size :])


def _refused_or_within_the_file(content: bytes) -> bool:
    try:
        header = read_header(memoryview(content), "shard")
    except CorruptCopyError:
        return True
    return header.values[1] <= len(content) and all(
        0 <= piece.start <= piece.stop <= len(content)
        and piece.stop - piece.start == math.prod(piece.shape) * ITEM_BYTES[piece.dtype]
        for piece in header.pieces.values()
    )


class _Good:
    """Made once: making one for each example would be most of the time."""

    content = b""

    def get(self, factory: pytest.TempPathFactory) -> bytes:
        self.content = self.content or _good(factory.mktemp("good"))
        return self.content


_GOOD = _Good()
