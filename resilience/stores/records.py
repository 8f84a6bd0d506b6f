"""The small JSON files beside the bytes: a copy's record, a save's certificate, an attempt's log.

Each carries `schema_version` and a checksum of itself, so that a torn or flipped file is noticed before anything in it
is believed. Decoding validates every field; what it returns can be used as a path or a size without another look.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast, get_args

import xxhash

from resilience.errors import CorruptCopyError, NotAuthenticError
from resilience.planning.inventory import AttemptLog, Role, SaveId, Tier
from resilience.stores.authentication import UNSEALED, Seal
from resilience.stores.digest import ALGORITHM, STRONG, is_digest

__all__ = [
    "SCHEMA_VERSION",
    "ShardRecord",
    "decode_attempt_log",
    "decode_certificate",
    "decode_record",
    "encode_attempt_log",
    "encode_certificate",
    "encode_record",
    "is_name",
    "not_authentic",
    "seal_json",
    "unseal_json",
]

SCHEMA_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_ATTEMPT = re.compile(r"[0-9a-f]{32}")
_MAX_RANKS = 1 << 20
#: What a MAC is for.
_RECORD, _CERTIFICATE, _ATTEMPT_LOG = "record", "certificate", "attempt log"


@dataclass(frozen=True)
class ShardRecord:
    """One copy of one owner's shard. Written last, by rename: without it the bytes beside it are no checkpoint."""

    run_id: str
    save: SaveId
    owner: int
    world_size: int
    role: Role
    tier: Tier
    node_id: str
    nbytes: int
    digest: str
    created: float  # Unix seconds; for people, never compared across hosts
    split: bool = False  # parts of what data parallelism replicates lie in the other shards of its group


def is_name(text: object) -> bool:
    """Whether `text` may become one component of a path: run and node ids, names from other people's files."""
    return isinstance(text, str) and _NAME.fullmatch(text) is not None


def seal_json(fields: Mapping[str, Any], seal: Seal = UNSEALED, purpose: str = "") -> bytes:
    """Canonical JSON of `fields` with `schema_version` and `checksum`; where there is a key, with `mac`."""
    body = {"schema_version": SCHEMA_VERSION, **fields}
    mac = seal.mac(purpose, _canonical(body).encode())
    if mac:
        body["mac"] = mac
    return (_canonical({**body, "checksum": _checksum(body)}) + "\n").encode()


def unseal_json(content: bytes, what: str, seal: Seal = UNSEALED, purpose: str = "") -> dict[str, Any]:
    """The fields of a sealed JSON file; CorruptCopyError that names `what` if it is not one, or not authentic."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{what} is no JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise CorruptCopyError(f"{what} is no JSON object.")
    checksum = fields.pop("checksum", None)
    try:
        expected = _checksum(fields)
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{what} cannot be read: {error}.") from error
    if checksum != expected:
        raise CorruptCopyError(f"{what} does not match its own checksum.")
    mac = fields.pop("mac", None)
    problem = seal.problem(mac, purpose, _canonical(fields).encode())
    if problem:
        raise not_authentic(what, problem)
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise CorruptCopyError(
            f"{what} has schema_version {fields.get('schema_version')!r}; this version reads {SCHEMA_VERSION}.",
            advice="Use the version of torch-resilience that wrote it.",
        )
    return fields


def not_authentic(what: str, problem: str) -> NotAuthenticError:
    """What keeps a file out of every decision, as if it were not there, and says why."""
    return NotAuthenticError(f"{what} is not authentic: {problem}.")


def encode_record(record: ShardRecord, seal: Seal = UNSEALED) -> bytes:
    return seal_json(
        {
            "run_id": record.run_id,
            "attempt": record.save.attempt,
            "generation": record.save.generation,
            "iteration": record.save.iteration,
            "owner": record.owner,
            "world_size": record.world_size,
            "role": record.role,
            "tier": record.tier,
            "node_id": record.node_id,
            "bytes": record.nbytes,
            "digest": record.digest,
            "created": record.created,
            "split": record.split,
        },
        seal,
        _RECORD,
    )


def decode_record(content: bytes, what: str = "the record", seal: Seal = UNSEALED) -> ShardRecord:
    read = _Fields(unseal_json(content, what, seal, _RECORD), what)
    digest = read.digest("digest")
    if weakness := seal.weakness(digest):
        raise not_authentic(what, weakness)
    world_size = read.integer("world_size", 1, _MAX_RANKS)
    return ShardRecord(
        run_id=read.name("run_id"),
        save=read.save(),
        owner=read.integer("owner", 0, world_size - 1),
        world_size=world_size,
        role=cast(Role, read.choice("role", get_args(Role))),
        tier=cast(Tier, read.choice("tier", get_args(Tier))),
        node_id=read.name("node_id"),
        nbytes=read.integer("bytes", 1, 1 << 60),
        digest=digest,
        created=read.number("created"),
        split=read.boolean("split"),
    )


def encode_certificate(
    run_id: str, save: SaveId, world_size: int, protected: bool, digests: Mapping[str, str], seal: Seal = UNSEALED
) -> bytes:
    """Says that every rank committed its shard of `save` (and, if `protected`, every replica).

    `digests`: of the copies that this node holds, by owner; a file of one node, bounded by its ranks.
    """
    return seal_json(
        {
            "run_id": run_id,
            "attempt": save.attempt,
            "generation": save.generation,
            "iteration": save.iteration,
            "world_size": world_size,
            "protected": protected,
            "digests": dict(digests),
        },
        seal,
        _CERTIFICATE,
    )


def decode_certificate(content: bytes, what: str = "the certificate", seal: Seal = UNSEALED) -> tuple[str, SaveId]:
    """`(run_id, save)`."""
    read = _Fields(unseal_json(content, what, seal, _CERTIFICATE), what)
    return read.name("run_id"), read.save()


def encode_attempt_log(log: AttemptLog, seal: Seal = UNSEALED) -> bytes:
    return seal_json(
        {
            "run_id": log.run_id,
            "attempt": log.attempt,
            "generation": log.generation,
            "base": _save_json(log.base),
            "fork": list(log.fork) if log.fork else None,
            "completed": _save_json(log.completed),
            "end": log.end,
            "end_iteration": log.end_iteration,
        },
        seal,
        _ATTEMPT_LOG,
    )


def decode_attempt_log(content: bytes, what: str = "the attempt log", seal: Seal = UNSEALED) -> AttemptLog:
    read = _Fields(unseal_json(content, what, seal, _ATTEMPT_LOG), what)
    fork = read.fields.get("fork")
    if fork is not None and not (
        isinstance(fork, list) and len(fork) == 2 and type(fork[0]) is int and isinstance(fork[1], str)
    ):
        raise read.wrong("fork", "null or [iteration, fork id]")
    end_iteration = read.fields.get("end_iteration")
    return AttemptLog(
        run_id=read.name("run_id"),
        attempt=read.attempt("attempt"),
        generation=read.integer("generation", 0, 1 << 40),
        base=read.optional_save("base"),
        fork=(fork[0], fork[1]) if fork else None,
        completed=read.optional_save("completed"),
        end=read.choice("end", ("", "finished", "stopped", "failed")),
        end_iteration=None if end_iteration is None else read.integer("end_iteration", 0, 1 << 53),
    )


class _Fields:
    """Typed access to an untrusted JSON object."""

    def __init__(self, fields: Mapping[str, Any], what: str) -> None:
        self.fields = fields
        self.what = what

    def wrong(self, key: str, expected: str) -> CorruptCopyError:
        found = repr(self.fields.get(key))[:80]
        return CorruptCopyError(f"{self.what}: field {key!r} is {found}; expected {expected}.")

    def integer(self, key: str, low: int, high: int) -> int:
        value = self.fields.get(key)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(key, f"an integer from {low} to {high}")
        return value

    def number(self, key: str) -> float:
        value = self.fields.get(key)
        if type(value) not in (int, float) or not abs(cast(float, value)) < 1 << 63:
            raise self.wrong(key, "a number below 2^63")
        return float(cast(float, value))

    def boolean(self, key: str) -> bool:
        value = self.fields.get(key)
        if type(value) is not bool:
            raise self.wrong(key, "true or false")
        return value

    def name(self, key: str) -> str:
        value = self.fields.get(key)
        if not is_name(value):
            raise self.wrong(key, "a name of letters, digits, '.', '_' and '-'")
        return cast(str, value)

    def attempt(self, key: str) -> str:
        value = self.fields.get(key)
        if not isinstance(value, str) or not _ATTEMPT.fullmatch(value):
            raise self.wrong(key, "32 hexadecimal digits")
        return value

    def digest(self, key: str) -> str:
        value = self.fields.get(key)
        if not is_digest(value):
            raise self.wrong(key, f"{ALGORITHM}:<32 digits> or {STRONG}:<64 digits>")
        return cast(str, value)

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        value = self.fields.get(key)
        if value not in allowed or not isinstance(value, str):
            raise self.wrong(key, f"one of {', '.join(map(repr, allowed))}")
        return value

    def save(self) -> SaveId:
        return SaveId(
            self.integer("iteration", 0, 1 << 53), self.integer("generation", 0, 1 << 40), self.attempt("attempt")
        )

    def optional_save(self, key: str) -> SaveId | None:
        value = self.fields.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "null or an object with iteration, generation, attempt")
        fields = _Fields(value, f"{self.what}, {key}")
        if (value.get("generation"), value.get("attempt")) == (0, ""):  # a folder that another program wrote
            return SaveId(fields.integer("iteration", 0, 1 << 53), 0, "")
        return fields.save()


def _save_json(save: SaveId | None) -> dict[str, Any] | None:
    return (
        None if save is None else {"iteration": save.iteration, "generation": save.generation, "attempt": save.attempt}
    )


def _canonical(fields: Mapping[str, Any]) -> str:
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _checksum(fields: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(_canonical(fields).encode())
