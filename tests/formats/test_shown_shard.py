"""What a shard shows of itself, and what is read from shards: the tensors that were saved, or a typed error."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.errors import CorruptCopyError, LayoutMismatchError, MissingKeysError
from resilience.formats import shards_reader
from resilience.formats.protocol import Target
from resilience.formats.shard_parts import SMALL_BYTES, parts_together, to_be_marked
from resilience.formats.shards_reader import ShardsReader
from resilience.formats.shown_shard import ShownShard, mark_of, shown_bytes, shown_of, small_marks
from resilience.planning.inventory import SaveId
from resilience.snapshot.arena import Arena, view_of
from resilience.snapshot.layout import Piece, ShardIdentity, plan_layout
from resilience.snapshot.loader import OpenShard
from resilience.stores.digest import segment_digests
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.shard_file import read_header
from resilience.stores.shared_records import FolderRecord

SAVE = SaveId(7, 2, "a" * 32)
_made = itertools.count()


def shard(
    folder: Path, owner: int, world: int, tensors: list[tuple[Piece, torch.Tensor]], group: list[int]
) -> OpenShard:
    """A sealed shard that holds these pieces; `item` of each piece is its place in the list."""
    layout = plan_layout([piece for piece, _ in tensors], {}, 2, group)
    path = folder / f"{owner}-{next(_made)}"
    arena = Arena(PosixFileSystem().create_mapping(path, layout.nbytes))
    arena.use(layout)
    for placed in layout.placed:
        view_of(arena.segment(0, layout.nbytes), placed).copy_(tensors[placed.piece.item][1])
    arena.write_values(b"{}")
    arena.seal(ShardIdentity("run", SAVE.attempt, 2, 7, owner, world, 2))
    arena.close()
    mapped = PosixFileSystem().open_mapping(path)
    return OpenShard(read_header(mapped.view, str(path)), mapped)


def part(key: str, tensor: torch.Tensor, whole: tuple[int, ...], offsets: tuple[int, ...], item: int) -> Piece:
    return Piece(key, tensor.dtype, whole, offsets, tuple(tensor.shape), False, item)


def reader_of(shards: dict[int, OpenShard], asked: dict[int, set[int]], segment_bytes: int) -> ShardsReader:
    """Reads nothing but what `asked` names, as `wanted` said before."""
    shown = {
        owner: shown_of(memoryview(shown_bytes(each, segment_digests(each.mapped.view))))
        for owner, each in shards.items()
    }
    headers = {owner: each.header for owner, each in shown.items()}
    marks = {owner: small_marks(each) for owner, each in shown.items()}
    for owner, keys in to_be_marked(headers).items():
        marks[owner] |= {key: mark_of(shards[owner], headers[owner].pieces[key]) for key in keys}

    def content(owner: int, low: int, high: int) -> torch.Tensor:
        assert set(range(low // segment_bytes, (high - 1) // segment_bytes + 1)) <= asked[owner]
        return shards[owner].content()[low:high]

    record = FolderRecord("run", SAVE, len(shards), "shards", {})
    return ShardsReader(Path("there"), record, shown, parts_together(headers, marks), (), content)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_part_of_a_tensor_is_read_from_any_shards_and_no_other_segment_is_touched(
    data: st.DataObject, tmp_path: Path
) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    whole = torch.randint(0, 200, shape).to(dtype)
    world, axis = data.draw(st.integers(1, 5)), data.draw(st.integers(0, len(shape) - 1))
    cuts = sorted(data.draw(st.lists(st.integers(0, shape[axis]), min_size=world - 1, max_size=world - 1)))
    shards = {}
    for owner, (start, stop) in enumerate(zip([0, *cuts], [*cuts, shape[axis]], strict=True)):
        mine = whole.narrow(axis, start, stop - start)
        offsets = tuple(start if each == axis else 0 for each in range(len(shape)))
        own = torch.full((3,), float(owner))
        pieces = [(part("model/0/w", mine, shape, offsets, 0), mine), (part("rng/x", own, (3,), (0,), 1), own)]
        shards[owner] = shard(tmp_path, owner, world, pieces, [owner])
    box = [sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))) for n in shape]
    box = [(low, max(high, low + 1)) for low, high in box]
    out = torch.zeros([high - low for low, high in box], dtype=dtype)
    asked: dict[int, set[int]] = {}
    segment = 64
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_reader, "SEGMENT_BYTES", segment)
        reader = reader_of(shards, asked, segment)
        target = Target("model/0/w", out, tuple(low for low, _ in box), shape)
        asked.update(reader.wanted([target]))
        reader.read([target])
    assert torch.equal(out, whole[tuple(slice(low, high) for low, high in box)])
    states = [reader.rank_state(rank) for rank in range(world)]
    assert [state.tensors["rng/x"].tolist() for state in states if state] == [
        [float(rank)] * 3 for rank in range(world)
    ]
    assert reader.rank_state(world) is None
    rows_bytes = out.shape[0] * whole[0].numel() * whole.element_size()
    assert sum(map(len, asked.values())) <= 2 * world + rows_bytes // segment, "other rows stay where they are"


def test_a_tensor_of_a_rank_s_own_is_promised_where_it_is_large_and_kept_once_its_bytes_are_there(
    tmp_path: Path,
) -> None:
    large = [torch.arange(SMALL_BYTES, dtype=torch.float32) + rank for rank in range(2)]
    shards = {
        rank: shard(tmp_path, rank, 2, [(part("extra/e", large[rank], (SMALL_BYTES,), (0,), 0), large[rank])], [rank])
        for rank in range(2)
    }
    asked: dict[int, set[int]] = {}
    reader = reader_of(shards, asked, 32 << 20)
    state = reader.rank_state(1)
    assert state is not None
    assert state.digests.keys() == {"extra/e"}
    other = reader.rank_state(0)
    assert other is not None
    assert other.digests != state.digests, "told without a look at the tensors"
    assert reader.wanted([]) == {}
    promised = state.tensors["extra/e"]
    asked.update(reader.wanted([]))
    assert asked == {1: {0}}
    reader.fill()
    assert torch.equal(promised, large[1])
    assert reader.wanted([]) == {}


def test_what_ranks_have_alike_is_whole_and_parts_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    def shards_of(tensors: list[list[tuple[Piece, torch.Tensor]]]) -> dict[int, OpenShard]:
        return {rank: shard(tmp_path, rank, len(tensors), mine, [rank]) for rank, mine in enumerate(tensors)}

    one = torch.arange(6.0)
    alike = part("model/0/w", one, (6,), (0,), 0)
    reader = reader_of(shards_of([[(alike, one)], [(alike, one)]]), {}, 64)
    state = reader.rank_state(0)
    assert reader.index.keys() == {"model/0/w"}
    assert state is not None
    assert not state.tensors
    reader = reader_of(shards_of([[(alike, one)], [(alike, one + 1)]]), {}, 64)
    state = reader.rank_state(1)
    assert state is not None
    assert state.tensors.keys() == {"model/0/w"}, "and the lowest rank's stands for the model"
    half = part("model/0/w", one, (12,), (0,), 0)
    with pytest.raises(LayoutMismatchError, match="6 elements of 12"):
        reader_of(shards_of([[(half, one)], [(half, one)]]), {}, 64)
    with pytest.raises(LayoutMismatchError, match="differ in its bytes"):
        reader_of(shards_of([[(half, one)], [(half, one + 1)]]), {}, 64)
    overlap = part("model/0/w", one, (8,), (2,), 0)
    first = part("model/0/w", one, (8,), (0,), 0)
    with pytest.raises(LayoutMismatchError, match="overlap"):
        reader_of(shards_of([[(first, one)], [(overlap, one)]]), {}, 64)
    other = one.to(torch.float64)
    last = part("model/0/w", other, (12,), (6,), 0)
    with pytest.raises(LayoutMismatchError, match="by one rank and as"):
        reader_of(shards_of([[(half, one)], [(last, other)]]), {}, 64)


def test_what_is_asked_for_has_to_be_there_and_to_fit(tmp_path: Path) -> None:
    one = torch.arange(6.0)
    reader = reader_of({0: shard(tmp_path, 0, 1, [(part("model/0/w", one, (6,), (0,), 0), one)], [0])}, {}, 64)
    with pytest.raises(MissingKeysError, match="model/0/v"):
        reader.read([Target("model/0/v", one, (0,))])
    with pytest.raises(LayoutMismatchError, match="asked for"):
        reader.read([Target("model/0/w", one, (1,))])
    with pytest.raises(LayoutMismatchError, match="of \\(7,\\)"):
        reader.read([Target("model/0/w", one, (0,), (7,))])


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    one = torch.arange(6.0)
    made = shard(tmp_path_factory.mktemp("told"), 0, 1, [(part("model/0/w", one, (6,), (0,), 0), one)], [0])
    return shown_bytes(made, segment_digests(made.mapped.view))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_what_was_told_of_a_shard_reads_back_or_is_a_typed_error(data: st.DataObject, told: bytes) -> None:
    content = bytearray(told)
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
            case "cut":
                del content[data.draw(st.integers(1, len(content))) :]
                content = content or bytearray(b"\0")
            case "insert":
                at = data.draw(st.integers(0, len(content)))
                content[at:at] = data.draw(st.binary(max_size=20))
    try:
        found = shown_of(memoryview(bytes(content)))
    except CorruptCopyError:
        return
    assert isinstance(found, ShownShard)
