"""The command line on saves written under a key: with it what was planted is found, without it nothing fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from resilience.stores.authentication import Key
from resilience.stores.digest import STRONG, digest_of
from resilience.stores.node_store import NodeStore
from resilience.stores.records import ShardRecord
from tests.cli.stores import FS, RUN, ask, ask_json, save_id, shard_bytes

SECRET = "a secret that only this job's ranks know"
NAME = "JOB_SECRET"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One rank's save of iteration 7 under the key, and one of iteration 9 that somebody planted."""
    monkeypatch.setenv(NAME, SECRET)
    honest = NodeStore(tmp_path, RUN, "node0", "local", FS, Key(SECRET.encode()))
    honest.prepare()
    for store, iteration in ((honest, 7), (NodeStore(tmp_path, RUN, "node0", "local", FS), 9)):
        save = save_id(iteration)
        content = shard_bytes(save, 0, 1)
        digest = digest_of(content, STRONG)
        record = ShardRecord(RUN, save, 0, 1, "primary", "local", "node0", len(content), digest, 0.0)
        store.commit_bytes(memoryview(content), record)
        store.write_certificate(save, 1, protected=False)
    return tmp_path


@pytest.mark.parametrize("words", [["ls"], ["explain"], ["verify"], ["verify", "--deep"]])
def test_without_the_key_saves_are_read_and_said_to_be_not_authenticated(
    place: Path, capsys: Any, words: list[str]
) -> None:
    document = ask_json(capsys, *words, "--local", place)
    assert document["authenticated"] is False
    assert any("not authenticated here: give --secret-env NAME" in note for note in document["notes"])
    assert "not authenticated here" in ask(capsys, *words, "--local", place).out


def test_with_the_key_a_planted_save_is_not_there_and_the_reason_is_told(place: Path, capsys: Any) -> None:
    listed = ask_json(capsys, "ls", "--local", place, "--secret-env", NAME)
    assert [save["iteration"] for save in listed["saves"]] == [7]
    assert listed["authenticated"] is True
    assert sum("not authentic: it has no MAC" in note for note in listed["notes"]) == 2
    explained = ask_json(capsys, "explain", "--local", place, "--secret-env", NAME)
    assert explained["decision"]["iteration"] == 7
    assert ask_json(capsys, "explain", "--local", place)["decision"]["iteration"] == 9, "who has no key is deceived"


def test_verify_names_what_has_no_mac(place: Path, capsys: Any) -> None:
    document = ask_json(capsys, "verify", "--deep", "--local", place, "--secret-env", NAME, status=1)
    assert {damage["iteration"] for damage in document["damaged"]} == {9}
    assert all("not authentic" in damage["reason"] for damage in document["damaged"])


def test_bytes_that_were_changed_under_the_key_are_damage_with_and_without_it(place: Path, capsys: Any) -> None:
    shard = next(place.rglob("iter_0000007/*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    for more in ([], ["--secret-env", NAME]):
        document = ask_json(capsys, "verify", "--deep", "--local", place, *more, status=1)
        assert any("its owner computed blake2b-256-32m:" in damage["reason"] for damage in document["damaged"])


@pytest.mark.parametrize(("value", "words"), [(None, "not set"), ("", "empty"), ("short", "5 bytes")])
def test_a_variable_without_a_secret_is_wrong_usage_and_is_named(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, value: str | None, words: str
) -> None:
    monkeypatch.delenv(NAME)
    if value is not None:
        monkeypatch.setenv(NAME, value)
    answer = ask(capsys, "ls", "--local", place, "--secret-env", NAME)
    assert answer.status == 2
    assert f"--secret-env: the {'secret in' if value else 'environment variable'} {NAME}" in answer.err
    assert words in answer.err


def test_another_key_makes_everything_not_there(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, SECRET + "?")
    assert ask_json(capsys, "ls", "--local", place, "--secret-env", NAME)["saves"] == []
    document = ask_json(capsys, "explain", "--local", place, "--secret-env", NAME, status=1)
    assert "files on its nodes without a MAC" in document["reason"]
    assert SECRET not in str(document)


def test_a_record_moved_to_another_save_s_folder_is_refused_although_its_mac_is_right(place: Path, capsys: Any) -> None:
    record = next(place.rglob("iter_0000007/*/*.json"))
    planted = next(place.rglob("iter_0000009/*/rank_*.json"))
    planted.write_bytes((record.parent / planted.name).read_bytes())
    listed = ask_json(capsys, "ls", "--local", place, "--secret-env", NAME)
    assert [save["iteration"] for save in listed["saves"]] == [7]
    assert any("speaks of" in note for note in listed["notes"])
