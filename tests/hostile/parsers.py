"""Every place where bytes of others are read, each with valid samples, ways to spoil them, and what may come of it.

A parser that reads a file gets one, in a directory that the session made; all else is in memory.
"""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from resilience.config import load_config
from resilience.contents import shard_contents
from resilience.errors import DivergedRanksError
from resilience.formats.convert import _run_config
from resilience.formats.dcp_metadata import parse_metadata
from resilience.formats.directory import INTEGRITY, MARKER, damaged_files, encode_run_config, marked_backend
from resilience.formats.folder_files import read_train_state
from resilience.formats.loader_files import encode_loader, loader_file, read_loader
from resilience.formats.protocol import Target
from resilience.formats.rank_object import rank_state_of
from resilience.formats.registry import foreign_problem, open_checkpoint, stored_items
from resilience.formats.shown_shard import _small_pieces, frames, shown_of
from resilience.formats.torch_archive import aligned, read_archive, saved_bytes, tensor_in
from resilience.observe.report import write_report
from resilience.planning.control import ControlReport, SlotReport, decode, encode
from resilience.planning.decision import Candidate, Decision, PassedOver
from resilience.planning.inventory import AttemptLog, Inventory, NodeSave, SharedSave
from resilience.planning.kept import Standing
from resilience.planning.restore_plan import Plan
from resilience.planning.retrieval import Fetch, LocalCopy, RetrievalPlan, Verify
from resilience.planning.wire import inventories_from_json, inventories_to_json
from resilience.replication.assembling import _unpacked as _unpacked_segments
from resilience.replication.tree import _join, _unpack
from resilience.restore import _plan_from_json
from resilience.state.reconcile import reconcile
from resilience.state.saved_world import layout_of, tensor_refs, tree_of
from resilience.state.tree import encode as encode_tree
from resilience.state.tree_decoder import decode as decode_tree
from resilience.stores.digest import digest_of, segment_digests
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.records import (
    decode_attempt_log,
    decode_certificate,
    decode_record,
    encode_attempt_log,
    encode_certificate,
    encode_record,
    seal_json,
    unseal_json,
)
from resilience.stores.shard_file import read_header
from resilience.stores.shared_records import (
    CommitNote,
    FolderRecord,
    Owner,
    decode_folder,
    decode_note,
    decode_owner,
    encode_folder,
    encode_note,
    encode_owner,
)
from resilience.stores.shared_store import SharedStore
from resilience.stores.trackers import TEXT_TRACKER, TRAIN_STATE_TRACKER, read_tracker, step_of
from tests.cli.stores import save_id, shard_bytes
from tests.core.shards import record_of
from tests.formats.worlds import meta, rows, save, whole
from tests.hostile.strategies import bytes_like, json_like, json_text

FS = PosixFileSystem()
SAVE = save_id(7)


@dataclass(frozen=True)
class Parser:
    """`also`: built-ins that its docstring promises."""

    name: str
    inputs: st.SearchStrategy[bytes]
    parse: Callable[[bytes], object]
    also: tuple[type[Exception], ...] = ()


# --- small JSON files with a checksum ---------------------------------------------------------------------------------


def _sealed(name: str, valid: bytes, parse: Callable[[bytes], object]) -> Parser:
    """Bytes at random, and fields at random under a checksum that fits: it keeps errors out, and nobody else."""
    fields = unseal_json(valid, "it")
    fields.pop("schema_version")
    resealed = json_like([fields]).filter(lambda each: isinstance(each, dict)).map(_seal)
    unsealed = json_text(json_like([json.loads(valid)]))
    return Parser(name, st.one_of(resealed, resealed, unsealed, bytes_like([valid])), parse)


def _seal(fields: Mapping[str, Any]) -> bytes:
    try:
        return seal_json(fields)
    except (ValueError, RecursionError):  # NaN and the like: only others write that
        return json.dumps(fields).encode()


def _small_files() -> list[Parser]:
    log = AttemptLog(
        "run", SAVE.attempt, 1, base=save_id(5), fork=(5, "f"), completed=SAVE, end="stopped", end_iteration=7
    )
    folder = FolderRecord("run", SAVE, 2, "torch_dist", {"a.bin": 5, "tokenizer/v.txt": 6}, save_id(5), (5, "f"))
    certificate = encode_certificate("run", SAVE, 2, True, {"0": digest_of(b"x")})
    return [
        _sealed("record", encode_record(record_of(b"x", 0, 2)), decode_record),
        _sealed("certificate", certificate, decode_certificate),
        _sealed("attempt log", encode_attempt_log(log), decode_attempt_log),
        _sealed("owner of a directory", encode_owner(Owner("run", SAVE.attempt, 1)), lambda c: decode_owner(c, "it")),
        _sealed("commit note", encode_note(CommitNote("run", SAVE)), lambda c: decode_note(c, "it")),
        _sealed("record of a folder", encode_folder(folder), lambda c: decode_folder(c, "it")),
    ]


# --- shards -----------------------------------------------------------------------------------------------------------


def _shards(place: Path) -> list[Parser]:
    valid = [shard_bytes(SAVE, owner, 2) for owner in range(2)]
    path = place / "rank_00000-of-00002.safetensors"

    def contents(content: bytes) -> None:
        path.write_bytes(content)
        shard_contents([path], FS)

    headers = [_header_of(each) for each in valid]
    spoiled = st.one_of(json_like(headers).map(_shard_with), bytes_like(valid))
    return [
        Parser("shard header", spoiled, lambda content: read_header(memoryview(content), "it")),
        Parser("shard's contents", spoiled, contents),
    ]


def _header_of(shard: bytes) -> dict[str, Any]:
    """With its nested JSON unfolded, so that what is in it is altered too."""
    size = int.from_bytes(shard[:8], "little")
    header = json.loads(shard[8 : 8 + size])
    inner = {name: json.loads(text) for name, text in header["__metadata__"].items() if text[:1] in "{["}
    header["__metadata__"] |= inner
    return {"header": header, "body": shard[8 + size :].hex()}


def _shard_with(document: Any) -> bytes:
    if not isinstance(document, dict):
        return json.dumps(document).encode()
    header, body = document.get("header"), document.get("body")
    if isinstance(header, dict) and isinstance(header.get("__metadata__"), dict):
        folded = header["__metadata__"].items()
        header["__metadata__"] = {k: v if isinstance(v, str) else json.dumps(v) for k, v in folded}
    text = json.dumps(header).encode()
    try:
        tail = bytes.fromhex(body) if isinstance(body, str) else b""
    except ValueError:
        tail = b""
    return len(text).to_bytes(8, "little") + text + tail


# --- pickles and archives ---------------------------------------------------------------------------------------------

#: What means something in a pickle: huge memo numbers, lengths and integers; names; marks.
PICKLE_WORDS = [
    b"r\xff\xff\xff\x7f",
    b"r\xff\xff\xff\x0f",
    b"B\xff\xff\xff\x7f",
    b"\x8e" + b"\xff" * 7 + b"\x7f",
    b"\x8e\0\0\0\0\x01\0\0\0",
    b"\x96\0\0\0\0\x01\0\0\0",
    b"\x8b\xff\xff\0\0" + b"\x7f" * 65535,
    b"\x8b\xff\xff\xff\x7f",
    b"p99999999999\n",
    b"2",
    b"0",
    b"(",
    b"]",
    b"}",
    b")",
    b"\x85",
    b"\x86",
    b"\x87",
    b"\x94",
    b"h\0",
    b"cos\nsystem\n",
    b"\x8c\x05posix\x8c\x06system\x93",
    b"R",
    b"b",
    b"s",
    b"u",
    b"Q",
    b"I" + b"9" * 5000 + b"\n",
    b"L" + b"9" * 5000 + b"L\n",
    b"\x95" + b"\xff" * 8,
    b"\x81",
    b"\x92",
    b".",
    b"\x8a\x09" + b"\xff" * 9,
]


def _metadata() -> bytes:
    chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([2, 3])) for at in (0, 2)]
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([4, 3]), chunks)
    places = {MetadataIndex("w", [at, 0]): _StorageInfo("__0_0.distcp", at * 1000, 2000) for at in (0, 2)}
    places[MetadataIndex("o")] = _StorageInfo("__1_0.distcp", 0, 100)
    stored = Metadata({"w": entry, "o": BytesStorageMetadata()}, {"w": ("w",)}, storage_data=places)
    return pickle.dumps(dataclasses.replace(stored, version="1.0.0"))


def _pickles(place: Path) -> list[Parser]:
    protocols = [pickle.dumps(pickle.loads(_metadata()), protocol) for protocol in (2, 3, 4, 5)]  # noqa: S301 - ours
    train_state = saved_bytes({"step": torch.tensor(7, dtype=torch.int32), "do_train": torch.tensor(True)})
    rank_object = saved_bytes([{"values": "{}", "tensors": {"a": torch.arange(3), "b": torch.zeros(2, 3)}}])
    tensors = [saved_bytes(torch.arange(12.0).reshape(3, 4)), saved_bytes(torch.zeros(3, dtype=torch.complex128))]
    loader = encode_loader({"position": 3, "workers": [{"seed": torch.arange(4)}]})

    def step(content: bytes) -> None:
        step_of(content, "it")

    def counters(content: bytes) -> None:
        (place / "train_state.pt").write_bytes(content)
        read_train_state(place, FS)

    def of_rank(content: bytes) -> None:
        state = rank_state_of(read_archive(memoryview(content), "it"), "it")
        assert sum(tensor.untyped_storage().nbytes() for tensor in state.tensors.values()) <= 64 * len(content)

    def tensor(content: bytes) -> None:
        found, _ = tensor_in(memoryview(bytearray(content)), "it", (torch.float32, torch.Size([3, 4])))
        plain = isinstance(found, torch.Tensor) and found.layout is torch.strided and not found.is_quantized
        if plain and found.numel() <= 1 << 16:  # a stride of 0 makes more of few bytes: readers compare shapes first
            aligned(found).clone()

    def of_loader(content: bytes) -> None:
        path = place / loader_file(0)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        read_loader(place, FS, 0, 1)

    return [
        Parser(".metadata", bytes_like(protocols, PICKLE_WORDS), lambda content: parse_metadata(content, "it")),
        Parser("tracker's step", bytes_like([train_state], PICKLE_WORDS) | _in_archive(train_state), step),
        Parser("train_state.pt", bytes_like([train_state], PICKLE_WORDS) | _in_archive(train_state), counters),
        Parser("rank's object", bytes_like([rank_object], PICKLE_WORDS) | _in_archive(rank_object), of_rank),
        Parser("tensor's archive", bytes_like(tensors, PICKLE_WORDS) | _in_archive(*tensors), tensor),
        Parser("loader file", bytes_like([loader], PICKLE_WORDS) | _in_archive(loader), of_loader),
    ]


@st.composite
def _in_archive(draw: st.DrawFn, *valid: bytes) -> bytes:
    """An archive whose zip is whole and whose pickle is not."""
    import zipfile

    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(draw(st.sampled_from(valid)))) as source, zipfile.ZipFile(out, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = draw(bytes_like([content], PICKLE_WORDS))
            target.writestr(entry.filename, content)
    return out.getvalue()


# --- folders of checkpoints -------------------------------------------------------------------------------------------


def _folders(place: Path) -> list[Parser]:
    return [
        *_dcp_folder(place / "iter_0000007"),
        *_zarr_folder(place / "zarr" / "iter_0000007"),
        *_shared(place / "shared"),
    ]


def _file_of(folder: Path, name: str, look: Callable[[], object]) -> Callable[[bytes], object]:
    """Write the bytes as one file of a folder, then look at the folder."""

    def parse(content: bytes) -> object:
        (folder / name).write_bytes(content)
        return look()

    return parse


def _dcp_folder(folder: Path) -> list[Parser]:
    save(folder, lambda rank: [whole("model/0/w", torch.arange(12.0))], common={"args": {"lr": 0.1}})
    marker, integrity = ((folder / name).read_bytes() for name in (MARKER, INTEGRITY))
    config, common = ((folder / name).read_bytes() for name in ("run_config.yaml", "common.pt"))
    data, metadata = ((folder / name).read_bytes() for name in ("__0_0.distcp", ".metadata"))

    def read() -> None:
        reader = open_checkpoint(folder, FS)
        try:
            _ = reader.common
            reader.rank_state(0)
            reader.read([Target("model/0/w", torch.zeros(12), (0,))])
        finally:
            reader.close()

    def restored(name: str, content: bytes, look: Callable[[bytes], object]) -> Callable[[bytes], object]:
        """What one input did to a file is undone before the next parser looks at the folder."""

        def parse(given: bytes) -> None:
            try:
                look(given)
            finally:
                (folder / name).write_bytes(content)

        return parse

    def parser(what: str, name: str, inputs: st.SearchStrategy[bytes], look: Callable[[], object]) -> Parser:
        original = (folder / name).read_bytes()
        return Parser(
            what, inputs, restored(name, original, _file_of(folder, name, look)), (FileNotFoundError, KeyError)
        )

    def yaml_dumped(found: dict[str, Any]) -> None:
        encode_run_config(dataclasses.replace(meta(), run_config=found))

    yaml = st.one_of(bytes_like([config], YAML_WORDS), json_text(json_like([{"model": {"a": 1}, "checkpoint": {}}])))
    return [
        parser(
            "metadata.json",
            MARKER,
            bytes_like([marker]) | json_text(json_like([json.loads(marker)])),
            lambda: marked_backend(folder, FS),
        ),
        parser(
            "integrity.json",
            INTEGRITY,
            bytes_like([integrity]) | json_text(json_like([json.loads(integrity)])),
            lambda: list(damaged_files(folder, FS)),
        ),
        parser("run_config.yaml", "run_config.yaml", yaml, lambda: yaml_dumped(_run_config(folder, FS))),
        parser("common.pt", "common.pt", bytes_like([common], PICKLE_WORDS) | _in_archive(common), read),
        parser("tensors of torch_dist", "__0_0.distcp", bytes_like([data], PICKLE_WORDS), read),
        parser(
            "items of torch_dist",
            ".metadata",
            bytes_like([metadata], PICKLE_WORDS),
            lambda: (stored_items(folder, FS), foreign_problem(folder, FS)),
        ),
    ]


def _zarr_folder(folder: Path) -> list[Parser]:
    tensor = torch.arange(24.0).reshape(6, 4)
    save(folder, lambda rank: [rows("model/0/w", tensor, 3 * rank, 3 * rank + 3)], world_size=2, form="zarr")
    group = folder / "tensors.zarr"
    document = json.loads((group / "zarr.json").read_bytes())
    chunk = next(path for path in sorted(group.rglob("*")) if path.is_file() and path.name != "zarr.json")
    name = chunk.relative_to(folder).as_posix()
    original, described = chunk.read_bytes(), (group / "zarr.json").read_bytes()

    def read() -> None:
        reader = open_checkpoint(folder, FS)
        try:
            reader.read([Target("model/0/w", torch.zeros(6, 4), (0, 0), (6, 4))])
        finally:
            reader.close()

    def chunks(content: bytes) -> None:
        try:
            _file_of(folder, name, read)(content)
        finally:
            chunk.write_bytes(original)

    def metadata(content: bytes) -> None:
        try:
            (group / "zarr.json").write_bytes(content)
            stored_items(folder, FS)
            foreign_problem(folder, FS)
            read()
        finally:
            (group / "zarr.json").write_bytes(described)

    inputs = st.one_of(json_text(json_like([document])), json_text(json_like([document])), bytes_like([described]))
    return [
        Parser("zarr metadata", inputs, metadata, (FileNotFoundError, KeyError)),
        Parser("zarr chunk", bytes_like([original]), chunks),
    ]


def _shared(root: Path) -> list[Parser]:
    """Small files at the top of a shared directory."""
    (root / "attempts").mkdir(parents=True)
    train_state = saved_bytes({"step": torch.tensor(7, dtype=torch.int32)})
    text = bytes_like([b"7", b"release", b"0000007\n", "٧".encode(), "²".encode(), b"1" * 5000])

    def store() -> SharedStore:
        return SharedStore(root, FS, source="save", foreign_problem=foreign_problem)

    def look() -> None:
        assert store().inventory("run").unknown == "", "what is damaged is no disk that fails"

    def note(content: bytes) -> None:
        name = CommitNote("run", SAVE).note_name
        (root / name).write_bytes(content)
        store().after_heal()

    notes = st.one_of(bytes_like([encode_note(CommitNote("run", SAVE))]), json_like([_note_fields()]).map(_seal_any))
    return [
        Parser("text tracker", text, _file_of(root, TEXT_TRACKER, lambda: read_tracker(root, FS))),
        Parser("binary tracker", bytes_like([train_state], PICKLE_WORDS), _file_of(root, TRAIN_STATE_TRACKER, look)),
        Parser("commit note of a directory", notes, note),
        Parser("attempt log of a directory", notes, _file_of(root, "attempts/a.json", look)),
    ]


def _note_fields() -> dict[str, Any]:
    fields = unseal_json(encode_note(CommitNote("run", SAVE)), "it")
    fields.pop("schema_version")
    return fields


def _seal_any(fields: Any) -> bytes:
    return _seal(fields) if isinstance(fields, dict) else json.dumps(fields).encode()


# --- values of the training state -------------------------------------------------------------------------------------


def _values() -> list[Parser]:
    tree = {
        "model": {"w": torch.zeros(3), "b": torch.nn.Parameter(torch.ones(2))},
        "layout": {"tp": 1, "pp": 1},
        "rng": {"numpy": np.arange(4), "python": (3, (1, 2), None)},
        "f": [float("nan"), 1e-300, 1 + 2j],
        "n": {1: "a", (2, "x"): b"\0\xff", None: {3, 4}},
        "d": torch.float16,
        "s": torch.Size([1, 2]),
        "t": np.float32(1),
    }
    values, tensors = encode_tree(tree)
    known = dict(tensors)
    document = json.loads(values)
    inputs = st.one_of(
        json_text(json_like([document])), json_text(json_like([document])), bytes_like([values], VALUE_WORDS)
    )

    def trees(content: bytes) -> None:
        tree = tree_of(content)
        list(tensor_refs(tree))
        layout_of(tree)

    return [
        Parser("values", inputs, lambda content: decode_tree(content, known.__getitem__)),
        Parser("values of a saved world", inputs, trees),
        Parser("values held against live ones", inputs, lambda content: reconcile(content, values)),
    ]


VALUE_WORDS = [
    b'{"$tensor":"model/w","dtype":"float32"}',
    b'{"$int":"' + b"f" * 4000 + b'"}',
    b'{"$bytes":"AA"}',
    b'{"$dtype":"load"}',
    b'{"$size":[-1]}',
    b'{"$scalar":"00","dtype":"<M8[s]"}',
    b'{"$array":"x","dtype":"<U999999999","shape":[0]}',
    b'{"$device":"cuda"}',
]


# --- what ranks tell each other ---------------------------------------------------------------------------------------


def _wire() -> list[Parser]:
    save_ = SAVE
    held = NodeSave(
        "a", "local", "run", save_, 2, (0, 1), (digest_of(b"a"), digest_of(b"b")), (1, 2), ("primary", "replica")
    )
    log = AttemptLog("run", save_.attempt, 1, base=save_id(5), fork=(5, "f"), completed=save_, end="stopped")
    shared = SharedSave("persistent", "run", save_, 2, 100, "save")
    inventory = Inventory("a", (held,), (shared,), (log,), (save_,), "", ("n",), ("other",))
    told = inventories_to_json([inventory])
    fetch = Fetch(1, "b", "b", "local", 1, "a", 0, 100, digest_of(b"b"))
    plan = Plan(
        Decision("newest", 2, Candidate(save_, "local", "node", "a", "run", 100), (PassedOver(9, 1, "local", "torn"),)),
        RetrievalPlan((LocalCopy("a", 0, "a", "local", 10, digest_of(b"a")),), (fetch,), (Verify("a", 0, 0),)),
        Standing((save_,), (digest_of(b"a"),), ((1, 0),)),
        True,
        ("n",),
    )
    decided = json.dumps(dataclasses.asdict(plan)).encode()
    packed = b"+" + b"".join(len(part).to_bytes(8, "big") + part for part in (b"", b"abc", b"{}"))
    vector = encode(ControlReport(7, saves=(SlotReport(save_, "primary"),)), [save_])

    def control(content: bytes) -> None:
        numbers = list(struct.unpack(f"<{len(content) // 8}q", content[: len(content) // 8 * 8]))
        decode(numbers)

    return [
        Parser("inventories", _json_bytes(told), inventories_from_json),
        Parser("plan of a restart", _json_bytes(decided), _plan_from_json),
        Parser("what a shard shows", _shown(), lambda content: shown_of(memoryview(content))),
        Parser(
            "segments that a rank wants",
            _json_bytes(b"[[0,[0,1,2]],[1,[]]]"),
            lambda content: _unpacked_segments(content, {0: [b""] * 5, 1: [b""]}),
        ),
        Parser(
            "words of a tree of groups", bytes_like([packed]), lambda content: _unpack(_join([content, packed])[1:])
        ),
        Parser(
            "control vector", bytes_like([struct.pack(f"<{len(vector)}q", *vector)]), control, (DivergedRanksError,)
        ),
    ]


def _shown() -> st.SearchStrategy[bytes]:
    """What `shown_bytes` makes of a verified shard, spoiled as bytes and with its first words altered."""
    shard = shard_bytes(SAVE, 0, 2)
    header = read_header(memoryview(shard), "it")
    head = shard[: 8 + int.from_bytes(shard[:8], "little")]
    start, stop = header.values
    small = [shard[piece.start : piece.stop] for piece in _small_pieces(header)]
    about = {"nbytes": len(shard), "segments": [digest.hex() for digest in segment_digests(memoryview(shard))]}
    valid = frames([json.dumps(about).encode(), head, shard[start:stop], *small])
    shown_of(memoryview(valid))
    told = json_text(json_like([about])).map(lambda word: frames([word, head, shard[start:stop], *small]))
    return st.one_of(bytes_like([valid]), told)


def _json_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    altered = json_text(json_like([json.loads(valid)]))
    return st.one_of(altered, altered, bytes_like([valid]))


# --- events and configuration -----------------------------------------------------------------------------------------

YAML_WORDS = [
    b"&a [*a]",
    b"*a",
    b"!!python/object/apply:os.system ['true']",
    b"!!int x",
    b"2001-99-99",
    b"? [a]\n: b\n",
    b"[" * 400,
    b"<<: 3\n",
    b"a0: &a0 [1,1]\n" + b"".join(b"a%d: &a%d [*a%d,*a%d,*a%d]\n" % (n, n, n - 1, n - 1, n - 1) for n in range(1, 40)),
    b"&a {x: *a}\n",
    b"!!float ",
    b"!!timestamp 2020-13-41",
    b"!!binary x",
    b"!!set {a, a}",
    b"!!omap [a]",
    b"---\n---\n",
    b"\x00",
    b"%YAML 9.9\n---\n",
    b"1e999",
    b"!!bool x",
    b"!!null x",
    b"0b2",
    b"1:99:99",
    b"\xef\xbf\xbe",
    b"9" * 5000,
]


def _events(place: Path) -> list[Parser]:
    base = {"v": 1, "t": 1.5, "node": "a", "rank": 0, "pid": 7, "attempt": "g0001-3f9ac01b"}
    told: list[dict[str, Any]] = [
        {**base, "event": "start", "run_id": "run", "world_size": 2},
        {**base, "event": "fresh", "t": 2.0},
        {**base, "event": "step", "iteration": 1, "step_s": 0.1, "t": 3.0},
        {
            **base,
            "event": "snapshot",
            "iteration": 1,
            "tiers": ["local"],
            "stall_s": 0.1,
            "bytes": 10,
            "kind": "x",
            "t": 3.5,
        },
        {**base, "event": "complete", "iteration": 1, "generation": 1, "t": 4.0},
        {**base, "event": "save_failed", "iteration": 1, "error": "e"},
        {**base, "event": "exception", "error": "e"},
        {
            **base,
            "event": "resume",
            "iteration": 1,
            "generation": 1,
            "tier": "local",
            "seconds": 1.0,
            "attempt": "g0002-aaaaaaaa",
            "t": 9,
        },
        {**base, "event": "metric", "name": "loss", "value": 1.5, "iteration": 1},
        {**base, "event": "finished", "iteration": 9, "t": 10},
        {**base, "event": "warning", "what": "w", "advice": "a"},
        {**base, "event": "save_skipped", "iteration": 3, "what": "w"},
        {**base, "rank": -1, "event": "launch", "nodes": ["a"], "t": 0.5},
        {**base, "rank": -1, "event": "fault", "spec": "kill", "what": "x"},
        {**base, "rank": -1, "event": "predicted", "explained": True, "decision": {"iteration": 1}},
        {**base, "rank": -1, "event": "gone"},
        {**base, "rank": -1, "event": "verdict", "passed": False, "problems": ["p"]},
        {**base, "event": "unequal_items", "items": ["a"]},
        {**base, "event": "stopped", "iteration": 9},
    ]
    whole_log = b"".join(json.dumps(event).encode() + b"\n" for event in told)
    one = json_text(json_like(told)).map(lambda line: whole_log + line.replace(b"\n", b" ") + b"\n")
    path = place / "events.jsonl"

    def report(content: bytes) -> None:
        path.write_bytes(content)
        write_report([path], path.with_name("run.html"))

    return [Parser("events", st.one_of(one, one, bytes_like([whole_log])), report)]


def _configuration(place: Path) -> list[Parser]:
    text = b"checkpoint:\n  save: /x\n  save_interval: 10\nresiliency:\n  keep_last: 3\n  run_id: abc\n"
    document = {"checkpoint": {"save": "/x", "save_interval": 10}, "resiliency": {"keep_last": 3, "mtbf_hours": 1.5}}
    path = place / "config.yaml"

    def yaml(content: bytes) -> None:
        path.write_bytes(content)
        load_config(path, env={})

    def environment(content: bytes) -> None:
        name, _, value = content.decode("utf-8", "surrogateescape").partition("=")
        load_config(None, env={name: value})

    def arguments(content: bytes) -> None:
        try:
            load_config(None, env={}, args=content.decode("utf-8", "surrogateescape").split("\n"))
        except SystemExit as ended:  # by --help
            if ended.code:
                raise

    variables = [
        b"RESILIENCE_CHECKPOINT__SAVE_INTERVAL=10",
        b"RESILIENCE_RESILIENCY__MTBF_HOURS=1.5",
        b"RESILIENCE_RESILIENCY__RUN_ID=a",
    ]
    options = [
        b"--checkpoint.save_interval\n10",
        b"--resiliency.keep_last=3",
        b"--checkpoint.async_save\n--resiliency.run_id\nx",
    ]
    values = json_text(json_like([document]))
    return [
        Parser("YAML configuration", st.one_of(bytes_like([text], YAML_WORDS), values), yaml),
        Parser("environment", bytes_like(variables, [b"9" * 5000, "٣".encode(), b"1e999", b"nan"]), environment),
        Parser(
            "command line", bytes_like(options, [b"--", b"=", b"-h", b"9" * 5000, b"{}", b"--config", b"\n"]), arguments
        ),
    ]


def parsers(place: Path) -> dict[str, Parser]:
    """All of them. `place`: a directory to put files in."""
    found = [
        *_small_files(),
        *_shards(place),
        *_pickles(place),
        *_folders(place),
        *_values(),
        *_wire(),
        *_events(place),
        *_configuration(place),
    ]
    return {each.name: each for each in found}
