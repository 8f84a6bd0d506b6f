"""The frame around all commands: help, statuses, JSON on stdout, errors, pipes, and what is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from resilience.cli import COMMANDS, main, parser_of
from tests.cli.stores import World, ask, ask_json
from tests.formats.worlds import RUN as SHARED_RUN
from tests.stores.test_shared_store import owned, publish


def python(*words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=200, check=False, **more
    )


def test_help_names_every_command_and_each_command_has_help_of_its_own(capsys: Any) -> None:
    top = ask(capsys, "--help")
    assert top.status == 0
    for command in COMMANDS:
        assert command.help in top.out
        own = ask(capsys, command.name, "--help")
        assert own.status == 0
        assert "--json" in own.out
        assert own.out.startswith(f"usage: resilience {command.name}")


def test_without_a_command_the_help_is_printed_as_wrong_usage(capsys: Any) -> None:
    answer = ask(capsys)
    assert answer.status == 2
    assert "explain" in answer.out


def test_a_misspelt_command_is_wrong_usage_with_a_suggestion(capsys: Any) -> None:
    answer = ask(capsys, "verfy")
    assert answer.status == 2
    assert "did you mean 'verify'?" in answer.err


@pytest.mark.parametrize(
    "words", [("ls", "--lokal", "x"), ("nonsense",), ("explain", "--world-size", "0"), ("request",)]
)
def test_wrong_usage_is_one_json_document_on_stdout_if_json_was_asked_for(capsys: Any, words: tuple[str, ...]) -> None:
    answer = ask(capsys, *words, "--json")
    assert answer.status == 2
    assert answer.err == ""
    assert set(answer.document["error"]) == {"type", "message", "advice"}
    assert answer.document["error"]["type"] == "UsageError"


def test_a_directory_that_is_not_there_gives_status_2_and_names_it(capsys: Any, tmp_path: Path) -> None:
    for option in ("--local", "--save", "--global-dir"):
        error = ask_json(capsys, "ls", option, tmp_path / "nowhere", status=2)["error"]
        assert f"{option} {tmp_path}/nowhere is not there" in error["message"]
        assert error["advice"] not in error["message"]


def test_a_directory_that_cannot_be_read_gives_status_3(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    world = World(tmp_path)
    world.save(10)
    listdir = os.listdir

    def refuse(path: Any) -> list[str]:
        if Path(path) == world.base("node1") / "run" / "node1" / "iter_0000010":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    for command in ("ls", "verify", "outcome", "prune"):
        error = ask_json(capsys, command, *world.local, status=3)["error"]
        assert "Permission denied" in error["message"], command


def test_nothing_given_and_no_node_memory_says_what_to_give(capsys: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("RESILIENCE_MEMORY_DIR", str(tmp_path / "none"))
    error = ask_json(capsys, "ls", status=2)["error"]
    assert "--local DIR" in error["advice"]


def test_this_users_node_memory_is_looked_at_when_nothing_is_given(
    capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    world = World(tmp_path, ranks=1, node_of=lambda rank: "n")
    world.save(10, replicas=False)
    monkeypatch.setenv("RESILIENCE_MEMORY_DIR", str(world.base("n")))
    assert [save["iteration"] for save in ask_json(capsys, "ls")["saves"]] == [10]


def test_reading_commands_do_not_import_torch(tmp_path: Path) -> None:
    world = World(tmp_path, run_id=SHARED_RUN)
    world.save(10)
    publish(owned(tmp_path / "save"), 20)
    folder = tmp_path / "save" / "iter_0000020"
    commands = [["ls"], ["verify", "--deep"], ["explain"], ["inspect", "10"], ["inspect", str(folder)], ["prune"]]
    program = (
        "import sys\n"
        "from resilience.cli import main\n"
        "assert 'torch' not in sys.modules, 'import resilience.cli'\n"
        f"for command in {commands}:\n"
        "    assert main([*command, *sys.argv[1:], '--json']) == 0, command\n"
        "    assert 'torch' not in sys.modules, command\n"
    )
    done = python("-c", program, *world.local, "--save", tmp_path / "save")
    assert done.returncode == 0, done.stderr


def test_a_reader_that_has_read_enough_does_no_harm(tmp_path: Path) -> None:
    world = World(tmp_path)
    for iteration in range(1, 60):
        world.save(iteration, replicas=False, certified=False, owners=[0])
    words = " ".join(["-m", "resilience.cli", "ls", "--json", "--local", str(world.base("node0"))])
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} {words} | head -1; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.stdout.split() == ["{", "0"]
    assert done.stderr == ""


def test_stdout_holds_one_json_document_and_nothing_else(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.save(10)
    done = python("-m", "resilience.cli", "ls", "--json", *world.local)
    assert json.loads(done.stdout)["saves"]
    assert done.stderr == ""


def test_the_completion_script_is_valid_and_knows_every_option(capsys: Any, tmp_path: Path) -> None:
    answer = ask(capsys, "completion", "bash")
    assert answer.status == 0
    script = tmp_path / "completion.bash"
    script.write_text(
        answer.out + '\nCOMP_WORDS=(resilience prune --keep); COMP_CWORD=2; _resilience; echo "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.split() == ["--keep-last", "--keep-persistent"], done.stderr


def test_each_parser_can_be_made_by_itself() -> None:
    for command in COMMANDS:
        assert parser_of(command).prog == f"resilience {command.name}"


def test_version_is_told(capsys: Any) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("resilience ")


def test_a_name_that_no_terminal_can_write_is_shown_all_the_same(capsys: Any, tmp_path: Path) -> None:
    """Half a character is a name like any other to a pickle; printing it ended the command in a traceback."""
    import dataclasses
    import pickle

    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import MetadataIndex

    from tests.formats.worlds import save, whole

    folder = tmp_path / "iter_0000007"
    save(folder, lambda rank: [whole("model/0/w", torch.arange(3.0))], run_id="")
    metadata = FileSystemReader(folder).read_metadata()
    half = "half\ud800"
    entry = metadata.state_dict_metadata.pop("w")
    metadata.state_dict_metadata[half] = entry
    places = {
        MetadataIndex(half, index.offset) if index.fqn == "w" else index: place
        for index, place in metadata.storage_data.items()
    }
    (folder / ".metadata").write_bytes(pickle.dumps(dataclasses.replace(metadata, storage_data=places)))
    answer = ask(capsys, "inspect", folder)
    assert answer.status == 0
    assert "half\\ud800" in answer.out
