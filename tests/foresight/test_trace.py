"""Traces of failures: what is read, and that nothing else is read as if it were one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.errors import ConfigError
from resilience.foresight.failures import Failure
from resilience.foresight.trace import read_trace

EXPECTED = (Failure(3600.0), Failure(9000.0, (1,)), Failure(36_000.0, (2, 3)))


@pytest.mark.parametrize(
    "text",
    [
        "hours,nodes\n10,2 3\n1,\n2.5,1\n",
        "seconds, nodes, why\n3600,,hang\n9000, 1, fan\n36000, 3;2, switch\n",
        '{"hours": 1}\n\n{"seconds": 9000, "nodes": 1}\n{"hours": 10, "nodes": [3, 2], "why": "switch"}\n',
    ],
    ids=["csv", "csv with more columns", "json lines"],
)
def test_both_forms_say_the_same(text: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    assert read_trace(path, 4) == EXPECTED


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("minutes,nodes\n1,2\n", "no column `hours` or `seconds`"),
        ("", "no column"),
        ("hours,nodes\n1,4\n", "line 2: there is no node 4"),
        ("hours,nodes\nsoon,\n", "line 2: hours is 'soon'"),
        ("hours,nodes\n-1,\n", "line 2: hours is '-1'"),
        ("hours,nodes\n1,\nnan,\n", "line 3: hours is 'nan'"),
        ("hours,nodes\n1,rack3\n", "nodes is 'rack3'"),
        ('{"hours": 1}\n[]\n', "line 2: an object is expected"),
        ('{"hours": 1}\n{"hours"\n', "line 2 is no JSON"),
        ('{"nodes": [1]}\n', "line 1: neither `hours` nor `seconds`"),
        ('{"hours": 1, "nodes": [1.5]}\n', "nodes is"),
        ('{"hours": [], "nodes": []}\n', "hours is"),
        ("hours,nodes\n1,\0\n", "nodes is|line"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=says):
        read_trace(path, 4)


@pytest.mark.parametrize("content", [b"\xff\xfe\0", None])
def test_a_file_that_is_no_text_or_not_there_is_told(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"trace (is no text|cannot be read)"):
        read_trace(path, 4)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(st.binary(max_size=60), st.text('{}[]",:hoursnd e-0123456789.\n', max_size=60).map(str.encode))
)
def test_any_bytes_are_a_trace_or_a_config_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_bytes(b"hours,nodes\n" + content if len(content) % 2 else content)
    try:
        found = read_trace(path, 4)
    except ConfigError:
        return
    assert all(failure.at_s >= 0 and set(failure.nodes) <= {0, 1, 2, 3} for failure in found)
