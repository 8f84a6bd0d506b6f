"""Growth as a picture: lines over the number of ranks, both axes logarithmic, beside a line that is exactly linear."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from benchmarks.log_axis import share
from resilience.observe.svg import picture, tag

__all__ = ["chart"]

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 1000, 380.0, 70, 40.0, 320.0, 70
_PANEL = (_WIDTH - 2 * _LEFT - _GAP) / 2
_STYLE = (
    "text { font: 13px system-ui, sans-serif; fill: #444 } .title { font-weight: 600; fill: #222 } "
    ".grid { stroke: #ddd } .line { fill: none; stroke-width: 2.5 } "
    ".linear { stroke: #999; stroke-dasharray: 5 5; fill: none }"
)
_COLOURS = ("#0b5cad", "#c2410c", "#15803d", "#7e22ce")
#: (title, unit, lines as (label, key, factor), whether a linear line is drawn beside them)
_PANELS = (
    (
        "The leader's work at a restart",
        (("plan, ms", "plan_s", 1e3), ("decode, ms", "decode_s", 1e3), ("memory, MB", "plan_memory", 1e-6)),
        True,
    ),
    (
        "What one rank has",
        (
            ("connections, most", "talks_to_most", 1.0),
            ("connections, median", "talks_to_median", 1.0),
            ("operations at a boundary, most", "exchanges_most", 1.0),
            ("replication partners", "partners_most", 1.0),
        ),
        False,
    ),
)


def chart(found: Sequence[Mapping[str, float]]) -> str:
    """`found`: figures by name, one entry per number of ranks, ascending."""
    parts = [tag("style", _STYLE)]
    for place, (title, lines, linear) in enumerate(_PANELS):
        parts += _panel(_LEFT + place * (_PANEL + _GAP + 20), title, lines, linear, found)
    words = (
        f"From {found[0]['ranks']:,.0f} to {found[-1]['ranks']:,.0f} ranks: work of the leader, connections of a rank."
    )
    return picture("scale", "Growth with the number of ranks", words, _HEIGHT, *parts) + "\n"


def _panel(
    left: float,
    title: str,
    lines: Sequence[tuple[str, str, float]],
    linear: bool,
    found: Sequence[Mapping[str, float]],
) -> list[str]:
    ranks = [entry["ranks"] for entry in found]
    series = [[max(entry[key] * factor, 1e-3) for entry in found] for _, key, factor in lines]
    low = math.floor(math.log10(min(map(min, series))))
    high = math.ceil(math.log10(max(map(max, series))) + 0.05)

    def at(count: float, value: float) -> tuple[float, float]:
        x = left + _PANEL * share(count, ranks[0], ranks[-1])
        return x, _BOTTOM - (_BOTTOM - _TOP) * share(value, 10.0**low, 10.0**high)

    parts = [tag("text", title, x=left, y=22.0, class_="title")]
    for power in range(low, high + 1):
        y = at(ranks[0], 10.0**power)[1]
        parts.append(tag("line", x1=left, x2=left + _PANEL, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{10.0**power:g}", x=left - 8, y=y + 4, text_anchor="end"))
    for count in ranks[::2]:
        parts.append(tag("text", f"{count:,.0f}", x=at(count, 1)[0], y=_BOTTOM + 20, text_anchor="middle"))
    if linear:
        begin = series[0][-1] * ranks[0] / ranks[-1]
        ends = (at(ranks[0], max(begin, 10.0**low)), at(ranks[-1], series[0][-1]))
        first = ranks[-1] * 10.0**low / series[0][-1]
        if begin < 10.0**low:
            ends = (at(first, 10.0**low), ends[1])
        parts.append(_line(ends, "linear", ""))
    for number, ((label, _, _), values) in enumerate(zip(lines, series, strict=True)):
        colour = _COLOURS[number]
        parts.append(_line([at(*pair) for pair in zip(ranks, values, strict=True)], "line", colour))
        y = _BOTTOM + 38 + 16 * (number // 2)
        x = left + (number % 2) * _PANEL / 2
        parts.append(tag("rect", x=x, y=y - 9, width=12, height=4, fill=colour))
        parts.append(tag("text", label, x=x + 18, y=y))
    return parts


def _line(points: Sequence[tuple[float, float]], class_: str, colour: str) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return tag("polyline", points=path, class_=class_, **({"stroke": colour} if colour else {}))
