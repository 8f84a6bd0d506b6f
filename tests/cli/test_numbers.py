"""Numbers on the command line: what people type for a number of bytes, and what they are told of anything else."""

from __future__ import annotations

import argparse

import pytest

from resilience.cli_numbers import byte_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1", 1), ("4000000000", 4 * 10**9), ("80e9", 80 * 10**9), ("80GB", 80 * 10**9), ("1.5 gib", 3 * 2**29),
        ("2k", 2000), ("2KiB", 2048), ("1e+12b", 10**12), ("0.5T", 5 * 10**11),
    ],
)  # fmt: skip
def test_bytes_are_counted_as_people_write_them(text: str, count: int) -> None:
    assert byte_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "0.2", "-5", "much", "80XB", "1.2.3", "nan", "inf", "1e999", "GB", "１０"])
def test_what_is_no_number_of_bytes_is_refused_in_words(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="byte"):
        byte_count(text)
