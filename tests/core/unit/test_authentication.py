"""Whoever can write to a node's memory, or to the network, and does not know the key, cannot put a save into a job."""

from __future__ import annotations

import json
import pickle
import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import ConfigError, DivergedRanksError, ForgedMessageError, NotAuthenticError
from resilience.planning.decision import ElectionPolicy
from resilience.planning.election import elect
from resilience.planning.inventory import AttemptLog
from resilience.replication.authenticated import KeyedSession, OpenSession, agree_on_key
from resilience.replication.clique import CliqueExchange, ExchangeBrokenError, Offer
from resilience.replication.communicator import SoloAgreements
from resilience.replication.pace import Pace
from resilience.stores.authentication import UNSEALED, Key, Seal, key_of
from resilience.stores.digest import STRONG, algorithm_of, digest_of, is_digest
from resilience.stores.node_store import NodeStore
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
from resilience.testing.ranks import ThreadAgreements, on_all_ranks
from tests.core.fakes import SEND_TAGS, CountingInbox, FakeLinks, Wire
from tests.core.shards import ATTEMPT, FS, SAVE, record_of

SECRET = "correct horse battery staple"
KEY, OTHER = Key(SECRET.encode()), Key(b"another secret of the right length")
SIZE = 10_000


def strong(content: bytes, **fields: Any) -> Any:
    return record_of(content, digest=digest_of(content, STRONG), **fields)


# --- the primitive ----------------------------------------------------------------------------------------------------


@given(st.lists(st.binary(max_size=40), max_size=4), st.lists(st.binary(max_size=40), max_size=4))
def test_a_mac_is_that_of_these_parts_and_of_no_others(one: list[bytes], other: list[bytes]) -> None:
    assert KEY.problem(KEY.mac("record", *one), "record", *one) == ""
    assert (KEY.mac("record", *one) == KEY.mac("record", *other)) == (one == other), "lengths count: ab+c is not a+bc"


@pytest.mark.parametrize(
    "mac", [None, "", 7, [], "ä" * 64, "0" * 64, KEY.mac("certificate", b"x"), OTHER.mac("record", b"x")]
)
def test_what_has_no_mac_or_that_of_another_thing_or_key_is_not_believed(mac: object) -> None:
    assert KEY.problem(mac, "record", b"x")
    assert UNSEALED.problem(mac, "record", b"x") == "", "without a key nobody asks"


@pytest.mark.parametrize("size", [0, 1, 100, 1 << 20])
def test_a_strong_digest_is_one_of_its_own_kind(size: int) -> None:
    digest = digest_of(bytes(size), STRONG)
    assert is_digest(digest)
    assert algorithm_of(digest) == STRONG
    assert digest != digest_of(bytes(size + 1), STRONG)


def test_a_key_shows_itself_nowhere() -> None:
    assert "key" not in repr(KEY).lower().replace("key(…)", "")
    for leave in (pickle.dumps, json.dumps):
        with pytest.raises(TypeError):
            leave(KEY)
    assert not hasattr(KEY, "__dict__")


@pytest.mark.parametrize(
    ("env", "words"), [({}, "not set"), ({"JOB": ""}, "empty"), ({"JOB": "short secret"}, "has 12 bytes; at least 16")]
)
def test_a_variable_without_a_usable_secret_is_named_and_its_value_is_not(env: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        key_of("JOB", env)
    assert "JOB" in str(raised.value)
    assert "short secret" not in str(raised.value)


# --- files on nodes ---------------------------------------------------------------------------------------------------


def test_small_files_come_back_under_their_key_and_can_be_read_without_one() -> None:
    record, log = strong(b"x"), AttemptLog("run", ATTEMPT, 1, completed=SAVE)
    for seal in (KEY, UNSEALED):
        assert decode_record(encode_record(record, KEY), seal=seal) == record
        assert decode_attempt_log(encode_attempt_log(log, KEY), seal=seal) == log
        assert decode_certificate(encode_certificate("run", SAVE, 1, True, {}, KEY), seal=seal) == ("run", SAVE)


@given(
    st.sampled_from(["run_id", "attempt", "generation", "iteration", "owner", "digest", "bytes", "tier", "mac"]),
    st.data(),
)
def test_no_field_can_be_changed_by_who_can_compute_the_checksum_but_not_the_mac(
    field: str, data: st.DataObject
) -> None:
    fields = json.loads(encode_record(strong(b"x", world_size=4), KEY))
    known: dict[str, Any] = {
        "run_id": "other", "attempt": "0" * 32, "generation": 99, "iteration": 99, "owner": 3, "bytes": 2,
        "tier": "in_memory", "digest": digest_of(b"forged", STRONG),
        "mac": data.draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
    }  # fmt: skip
    forged = {key: value for key, value in fields.items() if key not in ("schema_version", "checksum")}
    forged[field] = known[field]
    content = seal_json(forged)
    assert unseal_json(content, "it"), "the checksum fits"
    with pytest.raises(NotAuthenticError, match="not authentic"):
        decode_record(content, seal=KEY)


def test_a_record_of_a_digest_that_can_be_deceived_proves_nothing() -> None:
    with pytest.raises(NotAuthenticError, match="other bytes can be found"):
        decode_record(encode_record(record_of(b"x"), KEY), seal=KEY)


def test_a_mac_of_one_kind_of_file_is_none_of_another() -> None:
    log = encode_attempt_log(AttemptLog("run", ATTEMPT, 1), KEY)
    with pytest.raises(NotAuthenticError):
        decode_record(log, seal=KEY)


def _store(base: Path, seal: Seal = UNSEALED) -> NodeStore:
    store = NodeStore(base, "run", "a", "local", FS, seal)
    store.prepare()
    return store


def test_a_planted_save_counts_as_not_there_and_the_reason_is_told(tmp_path: Path) -> None:
    """Newer than the job's own, whole, with record, certificate and log: all that an election could ask for."""
    store, planted = _store(tmp_path, KEY), replace(SAVE, iteration=99)
    store.commit_bytes(memoryview(b"good"), strong(b"good"))
    store.write_certificate(SAVE, 1, protected=True)
    for forger in (_store(tmp_path), _store(tmp_path, OTHER)):
        forger.commit_bytes(memoryview(b"evil"), strong(b"evil", save=planted))
        forger.write_certificate(planted, 1, protected=True)
        forger.write_attempt_log(AttemptLog("run", "f" * 32, 9, base=planted, fork=(99, "f"), completed=planted))
        found = store.reader.inventory()
        assert [held.save for held in found.node_saves] == [SAVE]
        assert (found.attempts, found.certificates, found.unauthentic) == ((), (SAVE,), 3)
        assert all("not authentic" in note for note in found.notes)
        decision = elect([found], run_id="run", world_size=1, strikes=frozenset(), policy=ElectionPolicy())
        assert decision.chosen is not None
        assert decision.chosen.save == SAVE
        FS.remove_tree(tmp_path / "run" / "a" / "iter_0000099")
        FS.remove_tree(tmp_path / "run" / "a" / "attempts")
    assert len(_store(tmp_path).reader.inventory().node_saves) == 1, "who has no key reads what has a MAC"


@pytest.mark.parametrize(("policy", "fresh"), [("stop", False), ("fresh", True)])
def test_a_key_that_is_new_to_a_run_does_not_quietly_start_it_afresh(tmp_path: Path, policy: Any, fresh: bool) -> None:
    before = _store(tmp_path)
    before.commit_bytes(memoryview(b"old"), record_of(b"old"))
    before.write_certificate(SAVE, 1, protected=True)
    found = _store(tmp_path, KEY).reader.inventory()
    decision = elect(
        [found], run_id="run", world_size=1, strikes=frozenset(), policy=ElectionPolicy(on_no_usable_save=policy)
    )
    assert decision.fresh == fresh
    if not fresh:
        assert decision.error is not None
        assert "2 files on its nodes without a MAC" in decision.error[1]


# --- agreements -------------------------------------------------------------------------------------------------------


class Tampering(ThreadAgreements):
    """A group whose words can be altered on their way: `alter(count, words)`, the same for all members."""

    alter: Callable[[int, list[bytes]], list[bytes]] = staticmethod(lambda count, words: words)
    count = 0

    def gather(self, payload: bytes) -> list[bytes]:
        self.count += 1
        return self.alter(self.count, super().gather(payload))

    def collect(self, payload: bytes) -> list[bytes]:
        told = self.gather(payload)
        return told if self.rank == 0 else []


def _together(
    size: int, work: Callable[[Any], Any], alter: Callable[[int, list[bytes]], list[bytes]] | None = None
) -> list[Any]:
    def on_rank(agreements: ThreadAgreements) -> Any:
        tampering = Tampering(agreements.rank, agreements.size, agreements._barrier, agreements._slots)
        if alter is not None:
            tampering.alter = alter  # type: ignore[method-assign]
        return work(tampering)

    return on_all_ranks(size, on_rank)


def _draw(rank: int) -> Callable[[int], str]:
    return lambda count: f"{rank:02x}" * count


def _session(name: bytes = b"session") -> KeyedSession:
    return KeyedSession(KEY, name)


def test_an_authenticated_group_says_what_was_said() -> None:
    def talk(group: Any) -> Any:
        sealed = _session().agreements(group, "g")
        told = sealed.gather(b"word of %d" % sealed.rank)
        said = sealed.broadcast(b"from 0" if sealed.rank == 0 else None)
        highest = sealed.maximum([sealed.rank, -sealed.rank, -(2**62)])
        sealed.barrier()
        collected = sealed.collect(b"for 0 from %d" % sealed.rank)
        return told, said, highest, sealed.size, collected

    for rank, found in enumerate(_together(3, talk)):
        collected = [] if rank else [b"for 0 from 0", b"for 0 from 1", b"for 0 from 2"]
        assert found == ([b"word of 0", b"word of 1", b"word of 2"], b"from 0", [2, 0, -(2**62)], 3, collected)


def _flip(words: list[bytes]) -> list[bytes]:
    return [bytes([word[0] ^ 1]) + word[1:] for word in words]


TAMPERS: dict[str, Callable[[int, list[bytes]], list[bytes]]] = {
    "a bit of a MAC": lambda count, words: _flip(words),
    "a bit of what is said": lambda count, words: [word[:-1] + bytes([word[-1] ^ 1]) for word in words],
    "the words of two members exchanged": lambda count, words: words[::-1],
    "nothing said": lambda count, words: [b""] * len(words),
    "a word cut off": lambda count, words: [word[:20] for word in words],
    "a word with more behind it": lambda count, words: [word + b"x" for word in words],
}


@pytest.mark.parametrize("how", TAMPERS)
def test_what_is_altered_between_the_members_of_a_group_is_refused(how: str) -> None:
    def talk(group: Any) -> Any:
        return _session().agreements(group, "g").gather(b"word of %d" % group.rank)

    for found in _together(2, talk, TAMPERS[how]):
        assert isinstance(found, ForgedMessageError)
        assert "not authentic" in str(found)

    def tell_the_first(group: Any) -> Any:
        return _session().agreements(group, "g").collect(b"word of %d" % group.rank)

    first, second = _together(2, tell_the_first, TAMPERS[how])
    assert isinstance(first, ForgedMessageError)
    assert second == []


def test_an_earlier_word_another_group_s_or_another_start_s_is_refused() -> None:
    recorded: list[list[bytes]] = []

    def record(count: int, words: list[bytes]) -> list[bytes]:
        recorded.append(words)
        return words

    _together(2, lambda group: _session().agreements(group, "g").gather(b"yes"), record)
    old = recorded[0]

    def twice(group: Any) -> Any:
        sealed = _session().agreements(group, "g")
        sealed.gather(b"no")
        return sealed.gather(b"no")

    replayed = _together(2, twice, lambda count, words: old if count == 2 else words)
    elsewhere = _together(2, lambda group: _session().agreements(group, "h").gather(b"no"), lambda count, words: old)
    later = _together(2, lambda group: _session(b"next").agreements(group, "g").gather(b"no"), lambda count, words: old)
    for found in (*replayed, *elsewhere, *later):
        assert isinstance(found, ForgedMessageError)


def test_a_vote_cannot_be_turned() -> None:
    """What the maximum of a vote would be is told by words with a MAC, not by sums on the way."""

    def turn(count: int, words: list[bytes]) -> list[bytes]:
        return [words[0], words[1][:32] + struct.pack("<q", 1)]

    for found in _together(2, lambda group: _session().agreements(group, "g").maximum([0]), turn):
        assert isinstance(found, ForgedMessageError)


# --- the start --------------------------------------------------------------------------------------------------------


def _hello(seal_of: Callable[[int], Seal], alter: Any = None) -> list[Any]:
    return _together(3, lambda group: agree_on_key(group, lambda: seal_of(group.rank), _draw(group.rank)), alter)


def test_ranks_with_one_key_come_to_one_session_and_without_any_to_none() -> None:
    for seal, session in _hello(lambda rank: KEY):
        assert seal is KEY
        assert isinstance(session, KeyedSession)
        assert session._name == _hello(lambda rank: KEY)[0][1]._name
    for seal, session in _hello(lambda rank: UNSEALED):
        assert (seal, type(session)) == (UNSEALED, OpenSession)
    assert isinstance(agree_on_key(SoloAgreements(), lambda: KEY, _draw(0))[1], KeyedSession)


def test_a_start_s_session_is_no_other_start_s() -> None:
    first, second = (
        _together(2, lambda group, shift=shift: agree_on_key(group, lambda: KEY, _draw(group.rank + shift)))[0][1]
        for shift in (0, 5)
    )
    assert first._name != second._name


@pytest.mark.parametrize(
    ("seal_of", "words"),
    [
        (lambda rank: OTHER if rank == 2 else KEY, "rank 2 holds another key than rank 0"),
        (lambda rank: UNSEALED if rank == 1 else KEY, "rank 0 has a key and rank 1 has none"),
        (lambda rank: KEY if rank == 1 else UNSEALED, "rank 1 has a key and rank 0 has none"),
        (lambda rank: KEY if rank else key_of("JOB", {}), "JOB is not set"),
    ],
)
def test_ranks_that_differ_in_their_key_all_raise_the_same_and_no_key_is_told(seal_of: Any, words: str) -> None:
    told: list[bytes] = []

    def listen(count: int, said: list[bytes]) -> list[bytes]:
        told.extend(said)
        return said

    for found in _hello(seal_of, listen):
        assert isinstance(found, ConfigError)
        assert words in str(found)
    for key in (KEY, OTHER):
        assert key._key not in b"".join(told)
        assert key._key.hex().encode() not in b"".join(told)


def test_a_first_word_that_is_altered_ends_the_start_in_an_error_and_not_in_a_session() -> None:
    def alter(count: int, words: list[bytes]) -> list[bytes]:
        return [words[0], b"{}", *words[2:]]

    for found in _hello(lambda rank: KEY, alter):
        assert isinstance(found, DivergedRanksError)


@pytest.mark.parametrize(
    "alter",
    [
        lambda count, words: [word.replace(b'"keyed":true', b'"keyed":false') for word in words],
        lambda count, words: [word.replace(b"0", b"f") for word in words] if count == 1 else words,
    ],
)
def test_neither_keys_nor_nonces_can_be_taken_away_by_altering_the_first_words(alter: Any) -> None:
    """Without keys all would believe anything; with old nonces old words. A rank knows what it said itself."""
    for found in _hello(lambda rank: KEY, alter):
        assert isinstance(found, ForgedMessageError)


# --- the clique's exchange --------------------------------------------------------------------------------------------


def _exchange(
    directory: Path, wire: Wire, save: Any = SAVE, session: KeyedSession | None = None, fill: int = 1
) -> list[Any]:
    """Two ranks hold each other's replicas; what each received, or the error it ended in."""
    ended: list[Any] = [None, None]

    def run(rank: int) -> None:
        from resilience.snapshot.arena import Arena

        own = directory / f"own{rank}-{save.iteration}-{fill}"
        arena = Arena(FS.create_mapping(own, SIZE))
        arena.mapped.view[:] = bytes([rank + fill]) * SIZE
        inbox = CountingInbox(directory / f"in{rank}-{save.iteration}-{fill}")
        links = (session or _session()).links(FakeLinks(wire, rank), "epoch0/clique0", rank)
        pace = Pace(None, lambda: 0.0, lambda seconds: None)
        exchange = CliqueExchange(links, rank, (1 - rank,), (1 - rank,), pace, STRONG)
        try:
            ended[rank] = exchange.run(Offer(save, arena, lambda: digest_of(bytes(arena.mapped.view), STRONG)), inbox)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ended[rank] = error
            wire.hung_up.add(rank)  # as who closes the connection

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return ended


def test_replicas_go_over_authenticated_links_with_a_digest_that_cannot_be_deceived(tmp_path: Path) -> None:
    for received, reasons in _exchange(tmp_path, Wire()):
        assert reasons == {}
        (got,) = received
        assert got.digest == digest_of(bytes([got.owner + 1]) * SIZE, STRONG)


def test_altered_bytes_are_refused_although_the_attacker_makes_the_digest_fit(tmp_path: Path) -> None:
    """Without a key this is the attack that succeeds: other bytes, and a closing frame with their digest."""
    evil = bytes([66]) * SIZE

    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if sender == 1 and tag == SEND_TAGS["segment"]:
            return torch.frombuffer(bytearray(evil[: len(content)]), dtype=torch.uint8)
        if sender == 1 and tag == SEND_TAGS["closing"]:
            text = digest_of(evil, STRONG).encode().ljust(len(content), b" ")
            return torch.frombuffer(bytearray(text), dtype=torch.uint8)
        return content

    first, second = _exchange(tmp_path, Wire(alter=alter))
    assert isinstance(first, ExchangeBrokenError)
    assert "not authentic" in str(first)
    assert first.rank == 1
    received, _ = second
    assert [got.owner for got in received] == [0], "the other way was not touched"


@pytest.mark.parametrize("tag", [SEND_TAGS["segment"]])
def test_altered_bytes_alone_are_told_by_their_digest(tmp_path: Path, tag: int) -> None:
    def alter(sender: int, receiver: int, its_tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, its_tag) == (1, tag):
            content[7] ^= 1
        return content

    (received, reasons), _ = _exchange(tmp_path, Wire(alter=alter))
    assert received == []
    assert "its bytes arrived with digest" in reasons[1]


@pytest.mark.parametrize("tag", [SEND_TAGS["opening"], SEND_TAGS["closing"], 101, 103])
@pytest.mark.parametrize("place", [0, -1])
def test_any_bit_of_a_frame_or_of_its_mac_ends_the_exchange_before_anything_is_believed(
    tmp_path: Path, tag: int, place: int
) -> None:
    def alter(sender: int, receiver: int, its_tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, its_tag) == (1, tag):
            content[place] ^= 1
        return content

    first, _ = _exchange(tmp_path, Wire(timeout_s=10.0, alter=alter))
    assert isinstance(first, ExchangeBrokenError)
    assert "not authentic" in str(first)


def test_an_older_save_s_frames_are_refused_for_a_newer_one(tmp_path: Path) -> None:
    """All of rank 1's messages of one exchange are repeated in the next: same clique, same shapes, real MACs."""
    recorded: list[tuple[int, torch.Tensor]] = []

    def record(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if sender == 1:
            recorded.append((tag, content.clone()))
        return content

    session = _session()
    _exchange(tmp_path, Wire(alter=record), session=session)

    def replay(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        return recorded.pop(0)[1] if sender == 1 and recorded else content

    same = list(recorded)
    first, _ = _exchange(tmp_path, Wire(timeout_s=10.0, alter=replay), session=_session(b"the next start"), fill=2)
    assert "not authentic" in str(first), "the save is the same, the start is another"
    recorded[:] = same
    first, _ = _exchange(
        tmp_path, Wire(timeout_s=10.0, alter=replay), save=replace(SAVE, iteration=8), session=session, fill=3
    )
    assert isinstance(first, ExchangeBrokenError)


def test_a_frame_of_an_earlier_exchange_over_the_same_links_is_refused(tmp_path: Path) -> None:
    """The closing frame of the first exchange in the second one's place, so that its digest would count again."""
    closings: list[torch.Tensor] = []

    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if sender == 1 and tag in (3, 103):
            closings.append(content.clone())
            return closings[len(closings) - 3] if len(closings) > 2 else content
        return content

    wire = Wire(timeout_s=10.0, alter=alter)
    links = [_session().links(FakeLinks(wire, rank), "l", rank) for rank in range(2)]
    for word in (b"first ", b"second"):
        sent = torch.frombuffer(bytearray(word), dtype=torch.uint8)
        links[1].wait(links[1].send(sent, 0, 3))
        arrived = torch.zeros(6, dtype=torch.uint8)
        incoming = links[0].receive(arrived, 1, 3)
        if word == b"first ":
            links[0].wait(incoming)
        else:
            with pytest.raises(ForgedMessageError):
                links[0].wait(incoming)
