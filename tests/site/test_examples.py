"""The documentation's examples: do commands parse, do scripts compile, and are the names that they import there?"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.cli import COMMANDS, parser_of
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.config.setting import settings_of
from tests.test_documentation import pages

_PLACES = {"N": "2", "EVENTS": "events", "LOCAL": "local", "SAVE": "save", "OLD_RUN": "run", "RUN_ID": "run"}


def command_lines(repository: Path) -> Iterator[tuple[str, list[str]]]:
    """`page: line` and words of every `resilience …` that stands as code of its own, continued lines joined."""
    for page in pages(repository):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^(?:    )+(?:\$ )?(resilience .*)$", text, flags=re.MULTILINE):
            words = shlex.split(line.split("  #")[0], comments=False)
            yield f"{page.name}: {line}", words


def test_every_command_in_the_documentation_is_understood(repository: Path) -> None:
    parsers = {command.name: parser_of(command) for command in COMMANDS}
    seen = 0
    for where, words in command_lines(repository):
        if words[1] == "COMMAND" or "…" in words:  # a form, not an example
            continue
        assert words[1] in parsers, where
        parsers[words[1]].parse_args(words[2:])  # raises, with what is wrong
        seen += 1
    assert seen > 25


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_every_script_compiles_and_imports_what_is_there(repository: Path) -> None:
    seen = 0
    for page in pages(repository):
        for number, script in enumerate(blocks(page, "python")):
            where = f"{page.name}, script {number + 1}"
            tree = ast.parse(script, where)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "resilience":
                    module = importlib.import_module(node.module or "")
                    assert [name.name for name in node.names if not hasattr(module, name.name)] == [], where
                if (
                    isinstance(node, ast.Attribute)
                    and isinstance(node.value, ast.Name)
                    and node.value.id == "resilience"
                ):
                    assert hasattr(importlib.import_module("resilience"), node.attr), f"{where}: resilience.{node.attr}"
            seen += 1
    assert seen > 8


@pytest.mark.parametrize("kind", [CheckpointConfig, ResiliencyConfig])
def test_every_setting_in_a_script_or_a_file_is_one(repository: Path, kind: type) -> None:
    known = {entry.name for entry in settings_of(kind)}
    section = "checkpoint" if kind is CheckpointConfig else "resiliency"
    seen = 0
    for page in pages(repository):
        for script in blocks(page, "python"):
            for node in ast.walk(ast.parse(script)):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "id", getattr(node.func, "attr", "")) == kind.__name__
                ):
                    assert {word.arg for word in node.keywords} - {None} <= known, page.name
                    seen += 1
        for text in blocks(page, "yaml"):
            import yaml

            parsed = yaml.safe_load(text)
            if isinstance(parsed, dict) and section in parsed:
                assert set(parsed[section]) <= known, page.name
                seen += 1
    assert seen > 1
