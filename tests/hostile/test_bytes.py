"""Bad bytes against every parser: a typed error or a correct read, never a crash, a hang or a huge allocation.

`make test` tries a few thousand inputs, `make test-full` more than 50,000; how many is said at the end of the run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.hostile.child import Notebook, Tried, ask, in_a_child
from tests.hostile.corpus import CASES
from tests.hostile.parsers import Parser, parsers
from tests.hostile.summary import PROPERTY

Record = Callable[[str, Any], None]

_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
_QUICK = 60
_MORE = 200  # for `make test-full`
_THOROUGH = 1500  # for `make test-exhaustive`
_PARTS = 8
#: A YAML document takes as long as thirty of anything else.
_SLOW = {"run_config.yaml": 10, "YAML configuration": 10, "command line": 5}


@pytest.fixture(scope="module")
def known() -> Iterator[dict[str, Parser]]:
    place = Path(tempfile.mkdtemp(prefix="resilience-hostile-", dir=_MEMORY))
    try:
        yield parsers(place)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def test_every_case_of_the_corpus_ends_in_a_typed_error_or_a_correct_read(
    known: dict[str, Parser], record_property: Record
) -> None:
    assert CASES.keys() <= known.keys()
    tried, problems = 0, []
    for name, cases in CASES.items():
        outcome = in_a_child(_all_of(known[name], cases.values()))
        tried += outcome.inputs
        if outcome.problem:
            label = list(cases)[outcome.inputs - 1]
            problems.append(f"{name}: {label}: {outcome.problem[:3000]}")
    record_property(PROPERTY, tried)
    assert not problems, "\n\n".join(problems)
    assert tried == sum(map(len, CASES.values()))


def test_every_parser_survives_a_few_inputs_at_random(known: dict[str, Parser], record_property: Record) -> None:
    _survive(known.values(), _QUICK, record_property)


def test_a_thorough_run_tries_more_than_50_000_inputs(known: dict[str, Parser]) -> None:
    assert sum(_inputs_of(parser, _THOROUGH) for parser in known.values()) > 50_000


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("part", range(_PARTS))
def test_every_parser_survives_more_inputs_at_random(
    known: dict[str, Parser], part: int, record_property: Record
) -> None:
    _survive(list(known.values())[part::_PARTS], _MORE, record_property)


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("part", range(_PARTS))
def test_every_parser_survives_a_thorough_run(known: dict[str, Parser], part: int, record_property: Record) -> None:
    _survive(list(known.values())[part::_PARTS], _THOROUGH, record_property)


def _inputs_of(parser: Parser, inputs: int) -> int:
    return max(1, inputs // _SLOW.get(parser.name, 1))


def _survive(parsers: Iterable[Parser], inputs: int, record_property: Record) -> None:
    tried, problems = 0, []
    for parser in parsers:
        asked = _inputs_of(parser, inputs)
        outcome = attempt(parser, asked)
        tried += outcome.inputs
        if outcome.problem or outcome.inputs < asked:
            problems.append(f"{parser.name}: {outcome.inputs} of {asked}: {outcome.problem[:3000]}")
    record_property(PROPERTY, tried)
    assert not problems, "\n\n".join(problems)


def _all_of(parser: Parser, contents: Any) -> Callable[[Notebook], None]:
    def work(notebook: Notebook) -> None:
        for content in contents:
            notebook.begin(content)
            ask(parser.parse, content, parser.also)

    return work


def attempt(parser: Parser, inputs: int) -> Tried:
    """Inputs that hypothesis draws, always the same ones; the first that fails is made smaller."""

    def work(notebook: Notebook) -> None:
        @settings(
            max_examples=inputs, deadline=None, database=None, derandomize=True, report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(parser.inputs)
        def hold(content: bytes) -> None:
            notebook.begin(content)
            ask(parser.parse, content, parser.also)

        hold()

    return in_a_child(work)


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (lambda content: os.kill(os.getpid(), 11), "signal 11"),
        (lambda content: bytes(1 << 30), "MemoryError"),
        (lambda content: {}["x"], "KeyError"),
        (lambda content: os._exit(0), "ended without a word"),
    ],
)
def test_a_parser_that_handles_an_input_badly_is_caught(parse: Callable[[bytes], object], words: str) -> None:
    """Else all the others would prove nothing."""
    outcome = in_a_child(_all_of(Parser("bad", None, parse), [b"one"]))  # type: ignore[arg-type]
    assert words in outcome.problem
    assert outcome.inputs == 1
