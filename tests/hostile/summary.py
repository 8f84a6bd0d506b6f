"""Says at the end of a run how many hostile inputs were tried: from reports, as workers of xdist send them."""

from __future__ import annotations

from typing import Any

PROPERTY = "hostile_inputs"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = {
        report.nodeid: value
        for reports in terminalreporter.stats.values()
        for report in reports
        for name, value in getattr(report, "user_properties", ())
        if name == PROPERTY
    }
    if counts:
        terminalreporter.write_line(f"hostile inputs tried: {sum(counts.values()):,} in {len(counts)} tests")
