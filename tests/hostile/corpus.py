"""Nasty inputs that are tried in every run: what broke something once, and what breaks other people's parsers.

Each is under the name of its parser and a label of what it is.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Mapping
from typing import Any

from resilience.planning.control import VECTOR_LENGTH
from resilience.stores.digest import digest_of
from resilience.stores.records import seal_json
from tests.cli.stores import save_id, shard_bytes

__all__ = ["CASES"]

_SAVE = save_id(7)
_RECORD: dict[str, Any] = {
    "run_id": "run",
    "attempt": _SAVE.attempt,
    "generation": 1,
    "iteration": 7,
    "owner": 0,
    "world_size": 2,
    "role": "primary",
    "tier": "local",
    "node_id": "a",
    "bytes": 10,
    "digest": digest_of(b"x"),
    "created": 1.5,
    "split": False,
}
_FOLDER: dict[str, Any] = {
    "run_id": "run",
    "attempt": _SAVE.attempt,
    "generation": 1,
    "iteration": 7,
    "world_size": 2,
    "format": "torch_dist",
    "base": None,
    "fork": None,
    "files": {"a": 1},
}
_EVENT: dict[str, Any] = {
    "v": 1,
    "t": 1.5,
    "node": "a",
    "rank": 0,
    "pid": 7,
    "attempt": "g0001-3f9ac01b",
    "event": "start",
}
_DEEP = b"[" * 100_000


def _record(**fields: Any) -> bytes:
    return seal_json({**_RECORD, **fields})


def _lines(*events: Mapping[str, Any]) -> bytes:
    return b"".join(json.dumps({**_EVENT, **event}).encode() + b"\n" for event in events)


def _pickled(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


def _archive(pickled: bytes, **others: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in {"data.pkl": pickled, "byteorder": b"little", "version": b"3\n", **others}.items():
            archive.writestr(f"archive/{name.replace('__', '/')}", content)
    return out.getvalue()


def _shard(header: bytes, size: int | None = None) -> bytes:
    return (len(header) if size is None else size).to_bytes(8, "little") + header + bytes(64)


#: A pickle in which forty lines stand for 2^40 values, where a length belongs.
_LAUGHS = b"\x80\x02K\x01" + b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(40)) + b"."
_MEMO = _pickled(b"]r\xff\xff\xff\x7f")
_PICKLES = {
    "a memo number that would take 32 GiB": _MEMO,
    "the same as text": _pickled(b"]p2147483647\n"),
    "bytes of 4 GiB in ten": _pickled(b"B\xff\xff\xff\xff"),
    "bytes of 1 EiB in fifteen": _pickled(b"\x8e\0\0\0\0\0\0\0\x10"),
    "a bytearray of 16 GiB": b"\x80\x05\x96\0\0\0\0\x04\0\0\0.",
    "a frame of everything": b"\x80\x04\x95" + b"\xff" * 8 + b".",
    "an integer of 5,000 digits": _pickled(b"\x8b\x10\x27\0\0" + b"\x7f" * 10_000),
    "one that is named again and again": _LAUGHS,
    "brackets without end": _pickled(b"(" * 50_000),
    "one that calls something": b"cos\nsystem\n(S'true'\ntR.",
    "one that calls something by attribute": _pickled(b"\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R"),
    "an extension code": _pickled(b"\x82\x01"),
    "a persistent id": _pickled(b"K\x01Q"),
    "nothing": b"",
    "a mark that was never set": _pickled(b"t"),
}
_ARCHIVES = {
    "no entry": _archive(b"")[:4] + b"\0" * 30,
    "an entry named like no file": _archive(_pickled(b"}"), **{"..__..__etc__passwd": b"x"}),
    "a pickle that is none": _archive(b"\xff\xff"),
    # `zipfile` makes up for displaced entries, and torch's reader took what lay there for lengths
    "entries that lie 7 bytes later than they say": b"7 bytes" + _archive(_pickled(b"}")),
    "entries that lie 7 bytes earlier than they say": _archive(_pickled(b"}"))[7:],
    **{f"with {name}": _archive(content) for name, content in _PICKLES.items()},
}
_LENGTH = (
    b"ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}(X\x13\0\0\0state_dict_metadata}X\x0c\0\0\0storage_data}"
)
_LENGTH += (
    b"ctorch.distributed.checkpoint.metadata\nMetadataIndex\n)\x81}(X\x03\0\0\0fqnX\x01\0\0\0wX\x06\0\0\0offsetNub"
)
_LENGTH += b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n)\x81}("
_LENGTH += b"X\x0d\0\0\0relative_pathX\x01\0\0\0aX\x06\0\0\0offset"
_METADATA = {
    "a length of 24,000 digits": b"\x80\x02"
    + _LENGTH
    + b"\x8b\x10\x27\0\0"
    + b"\x7f" * 10_000
    + b"X\x06\0\0\0lengthK\x01ubsub.",
    "a length that is named again and again": b"\x80\x02" + _LENGTH + _LAUGHS[2:-1] + b"X\x06\0\0\0lengthK\x01ubsub.",
}

_YAMLS = {
    "aliases that stand for 3^39 values": b"a0: &a0 [1,1]\n"
    + b"".join(b"a%d: &a%d [*a%d,*a%d,*a%d]\n" % (n, n, n - 1, n - 1, n - 1) for n in range(1, 40)),
    "a list of itself": b"&a [*a]\n",
    "a section of itself": b"checkpoint: &a {save: *a}\n",
    "brackets without end": b"[" * 3000,
    "a key that cannot be one": b"? [1, 2]\n: 3\n",
    "a section twice": b"checkpoint: {}\ncheckpoint: {}\n",
    "an object of Python's": b"!!python/object/apply:os.system ['true']\n",
    "a day that is none": b"a: 2001-99-99\n",
    "no UTF-8": b"checkpoint: {save: \xff\xfe}\n",
    "a lone surrogate": b'checkpoint: {save: "\\ud800"}\n',
    "5,000 digits": b"checkpoint: {save_interval: " + b"9" * 5000 + b"}\n",
}
_JSONS = {
    "brackets without end": _DEEP,
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "not a number": b"NaN",
    "5,000 digits": b"1" * 5000,
    "null": b"null",
    "a lone surrogate": b'{"\\ud800": "\\udfff"}',
}

CASES: dict[str, dict[str, bytes]] = {
    "record": {
        "a date of 10^400": _record(created=10**400),
        "a name twice, the second one bad": _record()[:-2] + b',"owner":-1}',
        "a path in the node's name": _record(node_id="../../x"),
        "a run of 129 characters": _record(run_id="x" * 129),
        "an unknown field of 100,000 brackets": b'{"x":' + _DEEP,
        "a truth for a number": _record(owner=False),
        **_JSONS,
    },
    "certificate": dict(_JSONS),
    "attempt log": {
        "a fork of 10^400": seal_json(
            {"run_id": "run", "attempt": _SAVE.attempt, "generation": 1, "fork": [10**400, "x"], "end": ""}
        ),
        **_JSONS,
    },
    "record of a folder": {
        "a file that leads out": seal_json({**_FOLDER, "files": {"../x": 1}}),
        "a file with an absolute name": seal_json({**_FOLDER, "files": {"/etc/passwd": 1}}),
        "a file with a lone surrogate": seal_json({**_FOLDER, "files": {"tokenizer/\ud800": 1}}),
        "a file with NUL": seal_json({**_FOLDER, "files": {"tokenizer/a\0": 1}}),
        "a fork of 10^400": seal_json({**_FOLDER, "fork": [10**400, "x"]}),
        "lengths that add up to 2^60 thousand times": seal_json(
            {**_FOLDER, "files": {f"f{n}": (1 << 60) - 1 for n in range(1000)}}
        ),
        **_JSONS,
    },
    "owner of a directory": dict(_JSONS),
    "commit note": dict(_JSONS),
    "shard header": {
        "a header longer than the file": _shard(b"{}", 1 << 40),
        "a header of 2^64-1": _shard(b"{}", (1 << 64) - 1),
        "brackets without end": _shard(b"[" * 100_000),
        "no metadata": _shard(b"{}"),
        "metadata that are none": _shard(b'{"__metadata__": 3}'),
        "nothing": b"",
        "seven bytes": b"\x01" * 7,
        "70,000 bytes of no text": _shard(b"\x80" * 70_000),  # the error repeated them all
    },
    "shard's contents": {"values of 100,000 brackets": shard_bytes(_SAVE, 0, 1).replace(b'{"train_state"', b"[" * 14)},
    ".metadata": {**_PICKLES, **_METADATA},
    "tracker's step": {**_PICKLES, **_ARCHIVES},
    "train_state.pt": {**_PICKLES, **_ARCHIVES},
    "rank's object": dict(_ARCHIVES),
    "tensor's archive": dict(_ARCHIVES),
    "loader file": dict(_ARCHIVES),
    "common.pt": dict(_ARCHIVES),
    "metadata.json": dict(_JSONS),
    "integrity.json": {
        "a path that leads out": b'{"algorithm":"sha256","files":{"../../etc/passwd":"00"}}',
        "a file with a lone surrogate": b'{"algorithm":"sha256","files":{"\\ud800":"00"}}',
        **_JSONS,
    },
    "run_config.yaml": dict(_YAMLS),
    "YAML configuration": dict(_YAMLS),
    "zarr metadata": {
        "an array that leads out": b'{"zarr_format":3,"node_type":"group",'
        b'"consolidated_metadata":{"metadata":{"../x":{"node_type":"array"}}}}',
        **_JSONS,
    },
    "text tracker": {
        "digits of another script": "٧".encode(),
        "a superscript": "²".encode(),
        "5,000 digits": b"1" * 5000,
        "nothing": b"",
    },
    "binary tracker": dict(_ARCHIVES),
    "values": {
        **_JSONS,
        "an integer of 4,000 hexadecimal digits": b'{"$int":"' + b"f" * 4000 + b'"}',
        "an array of empty texts of any length": b'{"$array":"x","dtype":"<U0","shape":[281474976710656]}',
        "a text of 4 GB": b'{"$array":"x","dtype":"<U999999999","shape":[1]}',
        "a set of lists": b'{"$set":[[1]]}',
        "a dtype that is a function": b'{"$dtype":"load"}',
    },
    "values of a saved world": {
        **_JSONS,
        "a layout of nothing": b'{"layout":{}}',
        "a layout of texts": b'{"layout":{"tp":"1","pp":null}}',
    },
    "values held against live ones": {
        **_JSONS,
        "no number": b'{"model":[{}],"x":NaN}',
        "more than any float": b'{"model":[{}],"x":1e999}',
    },
    "inventories": {
        **_JSONS,
        "an object": b"{}",
        "a list of numbers": b"[1]",
        "owners that are texts": b'[{"source":"a","node_saves":[{"owners":"ab"}]}]',
    },
    "plan of a restart": {**_JSONS, "a refusal": b'{"refused":["os","system"]}'},
    "words of a tree of groups": {
        "a length beyond the end": b"+" + b"\xff" * 8 + b"abc",
        "a negative length": b"+" + b"\x80" + bytes(7),
        "nothing": b"",
        "someone is lost, in no number": b"-x",
    },
    "control vector": {
        "all highest": struct.pack(f"<{VECTOR_LENGTH}q", *[2**63 - 1] * VECTOR_LENGTH),
        "all lowest": struct.pack(f"<{VECTOR_LENGTH}q", *[-(2**63)] * VECTOR_LENGTH),
        "more saves than there is room for": struct.pack(
            f"<{VECTOR_LENGTH}q", *[7, -7, 0, 0, 0, 0, 0, 0, 0, 0, 99, -99], *[0] * (VECTOR_LENGTH - 12)
        ),
        "a step that there is not": struct.pack(
            f"<{VECTOR_LENGTH}q",
            *[7, -7, 0, 0, 0, 0, 0, 0, 0, 0, 1, -1, 0, 0, 0, 0, 0],
            *[1, -1, -9, 0, 0, 0],
            *[0] * (VECTOR_LENGTH - 23),
        ),
        "a negative number of saves": struct.pack(
            f"<{VECTOR_LENGTH}q", *[7, -7, 0, 0, 0, 0, 0, 0, 0, 0, -3, 3], *[0] * (VECTOR_LENGTH - 12)
        ),
    },
    "events": {
        "a time of 10^400": _lines({"t": 10**400}),
        "an iteration of 10^400": _lines(
            {}, {"event": "step", "iteration": 10**400}, {"event": "resume", "iteration": 10**400}
        ),
        "figures of 10^400": _lines(
            {"event": "snapshot", "iteration": 1, "bytes": 10**400, "stall_s": 10**400},
            {"event": "step", "iteration": 1, "step_s": 10**400},
        ),
        "a step of 10^308 s": _lines(
            {}, *({"event": "step", "iteration": n, "step_s": 1e308, "t": n} for n in range(9))
        ),
        "times apart": _lines({"t": -1e308}, {"t": 1e308}),
        "lone surrogates": _lines(
            {"run_id": "\ud800", "node": "\udfff"}, {"event": "warning", "what": "\ud800", "advice": "\udfff"}
        ),
        "tiers that are numbers": _lines({"event": "snapshot", "iteration": 1, "tiers": 3}),
        "nodes that are numbers": _lines({"t": 5}, {"rank": -1, "event": "launch", "nodes": 3}),
        "a decision that is a text": _lines(
            {"t": 1},
            {"rank": -1, "event": "fault", "t": 2},
            {"rank": -1, "event": "predicted", "explained": True, "decision": "x", "t": 3},
            {"attempt": "g0002-aaaaaaaa", "t": 4},
        ),
        "problems that are a number": _lines({}, {"rank": -1, "event": "verdict", "passed": False, "problems": 7}),
        "a name with markup": _lines({"run_id": "<script>alert(1)</script>", "node": "<b>"}),
        **_JSONS,
    },
    "environment": {
        "digits of another script": "RESILIENCE_CHECKPOINT__SAVE_INTERVAL=٣".encode(),
        "5,000 digits": b"RESILIENCE_CHECKPOINT__SAVE_INTERVAL=" + b"9" * 5000,
        "10^999": b"RESILIENCE_RESILIENCY__MTBF_HOURS=1e999",
        "no UTF-8": b"RESILIENCE_CHECKPOINT__SAVE=\xff\xfe",
        "an unknown name that is no UTF-8": b"RESILIENCE_\xff__X=1",
    },
    "command line": {"no UTF-8": b"--checkpoint.save\n\xff\xfe", "nothing": b"", "a value alone": b"x"},
}
