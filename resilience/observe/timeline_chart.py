"""The large picture of a report: progress over time above, one lane per node below, on one time axis. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from resilience.observe.phrases import human_seconds, plural
from resilience.observe.svg import HATCH, LEFT, RIGHT, WIDTH, picture, tag, ticks, time_ticks
from resilience.observe.timeline import Attempt, Run, Save, natural

_PROGRESS_TOP, _PROGRESS_HEIGHT = 34, 210
_LANE, _LANE_GAP = 18, 9
_MAX_LANES = 18
_MAX_POINTS = 500


class _Scale:
    """From the run's time and iterations to places in the picture."""

    def __init__(self, run: Run) -> None:
        self.began = run.began
        self.seconds = max(run.ended - run.began, 1e-3)
        self.top_iteration = max(run.reached, 1)

    def x(self, t: float) -> float:
        share = min(1.0, max(0.0, (t - self.began) / self.seconds))
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, iteration: float) -> float:
        return _PROGRESS_TOP + _PROGRESS_HEIGHT * (1 - iteration / self.top_iteration)


def timeline(run: Run) -> str:
    """Progress over time above, one lane per node below, on one time axis."""
    scale = _Scale(run)
    lanes = lanes_of(run)
    lanes_top = _PROGRESS_TOP + _PROGRESS_HEIGHT + 28
    bottom = lanes_top + len(lanes) * (_LANE + _LANE_GAP)
    parts = [HATCH, *_grid(run, scale, bottom), *_breaks(run, scale, bottom)]
    for attempt in run.attempts:
        parts += _climb(attempt, scale)
    parts += _falls(run, scale)
    parts += _save_dots(run, scale)
    for place, (label, node, special) in enumerate(lanes):
        parts.append(_lane(run, scale, label, node, lanes_top + place * (_LANE + _LANE_GAP), special))
    parts += _flags(run, scale)
    description = (
        f"Finished iterations over {human_seconds(scale.seconds)}, {plural(len(run.attempts), 'attempt')}, "
        f"{plural(len(run.interruptions), 'interruption')}. Below, one lane per node shows when it started up, "
        "trained, and did work that was lost. The table of attempts has the same figures."
    )
    return picture("timeline", "Timeline of the run", description, bottom + 34, *parts)


def _grid(run: Run, scale: _Scale, bottom: float) -> list[str]:
    parts = []
    for iteration in ticks(0, scale.top_iteration, 4):
        y = scale.y(iteration)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{iteration:,.0f}", x=LEFT - 10, y=y + 4, class_="axis end"))
    parts.append(tag("text", "iterations finished", x=LEFT - 10, y=_PROGRESS_TOP - 18, class_="axis caption"))
    for seconds, label in time_ticks(scale.seconds, 8):
        x = scale.x(run.began + seconds)
        parts.append(tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 5, class_="grid"))
        parts.append(tag("text", label, x=x, y=bottom + 20, class_="axis middle"))
    return parts


def _breaks(run: Run, scale: _Scale, bottom: float) -> list[str]:
    """From what broke to the next new step, a band through everything."""
    parts = []
    for interruption in run.interruptions:
        x = scale.x(interruption.broke)
        until = scale.x(interruption.stepped if interruption.stepped is not None else run.ended)
        box = {"y": _PROGRESS_TOP - 6, "height": bottom - _PROGRESS_TOP + 6}
        parts.append(tag("rect", x=x, width=max(1.0, until - x), class_="away", **box))
        parts.append(tag("line", x1=x, x2=x, y1=_PROGRESS_TOP - 6, y2=bottom, class_="broke"))
    return parts


def _climb(attempt: Attempt, scale: _Scale) -> list[str]:
    """The attempt's line, in two parts: what was kept, and what was lost and done again."""
    start = (attempt.training_from, attempt.base)
    kept = [start, *(point for point in attempt.steps if point[1] <= attempt.kept_until)]
    lost = [kept[-1], *(point for point in attempt.steps if point[1] > attempt.kept_until)]
    parts = [_line(kept, scale, "climb")]
    if len(lost) > 1:
        parts.append(_line(lost, scale, "climb lost"))
    return parts


def _line(points: Sequence[tuple[float, int]], scale: _Scale, class_: str) -> str:
    stride = max(1, math.ceil(len(points) / _MAX_POINTS))
    thinned = [*points[:-1:stride], points[-1]]
    path = " ".join(f"{scale.x(t):.1f},{scale.y(iteration):.1f}" for t, iteration in thinned)
    return tag("polyline", points=path, class_=class_)


def _falls(run: Run, scale: _Scale) -> list[str]:
    """Where training goes on after an interruption: a dotted way from what was reached to what was resumed."""
    parts = []
    for interruption in run.interruptions:
        if interruption.after is None:
            continue
        x1, y1 = scale.x(interruption.broke), scale.y(interruption.reached)
        x2, y2 = scale.x(interruption.after.training_from), scale.y(interruption.base)
        parts.append(tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="fall"))
        parts.append(tag("circle", cx=x2, cy=y2, r=4.5, class_="resumed"))
        if interruption.lost:
            label = f"−{plural(interruption.lost, 'iteration')}"
            parts.append(tag("text", label, x=x2 - 10, y=y2 + 18, class_="end lost-label"))
    return parts


def _save_dots(run: Run, scale: _Scale) -> list[str]:
    """Saves on the line: small for those kept on nodes, larger for persistent ones, crossed when they failed."""
    saves = run.saves
    ordinary = [save for save in saves if not save.persistent and not save.failed_on]
    stride = max(1, math.ceil(len(ordinary) / 150))
    shown = [*ordinary[::stride], *[save for save in saves if save.persistent or save.failed_on][:300]]
    return [_save_dot(save, scale) for save in shown]


def _save_dot(save: Save, scale: _Scale) -> str:
    x, y = scale.x(save.t), scale.y(save.iteration)
    if save.failed_on:
        return tag("path", d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8", class_="save failed")
    if save.persistent:
        return tag("rect", x=x - 4, y=y - 4, width=8, height=8, class_="save persistent")
    return tag("circle", cx=x, cy=y, r=2.6, class_="save")


def _flags(run: Run, scale: _Scale) -> list[str]:
    """Numbered flags that lead to the section of their interruption; reachable by keyboard."""
    parts, last_x = [], -100.0
    for number, interruption in enumerate(run.interruptions, 1):
        x = max(scale.x(interruption.broke), last_x + 24)
        last_x = x
        words = "; ".join(interruption.what) or "the processes ended"
        flag = (
            tag("title", escape(f"{number}: {words}")),
            tag("circle", cx=x, cy=_PROGRESS_TOP - 17, r=10),
            tag("text", str(number), x=x, y=_PROGRESS_TOP - 13, class_="middle"),
        )
        parts.append(
            tag("a", *flag, href=f"#break-{number}", class_="flag", aria_label=f"Interruption {number}: {words}")
        )
    return parts


def lanes_of(run: Run) -> list[tuple[str, str, bool]]:
    """(label, node, special) of the lanes to draw: every node, or of many those with a story and one for the rest."""
    nodes = run.nodes
    told = {node for node in nodes if _has_story(run, node)}
    if len(nodes) <= _MAX_LANES:
        return [(node, node, node in told) for node in nodes]
    special = sorted(told, key=natural)[: _MAX_LANES - 1]
    rest = [node for node in nodes if node not in special]
    return [*((node, node, True) for node in special), *([(f"{len(rest):,} others", rest[0], False)] if rest else [])]


def _has_story(run: Run, node: str) -> bool:
    """Not like the others: missing in some attempt, named by a fault, or with failed saves."""
    if any(node not in attempt.spells for attempt in run.attempts):
        return True
    specs = [spec for interruption in run.interruptions for spec in interruption.specs]
    specs += [str(event.get("spec")) for event in run.faults]
    return any(_names(spec, node) for spec in specs) or any(
        node == where for save in run.saves for where, _ in save.failed_on
    )


def _names(spec: str, node: str) -> bool:
    """Whether a fault's spec (`lose:node=2@35`) is about this node."""
    return f"node={node.removeprefix('node')}" in spec.replace("@", ",").replace(":", ",").split(",")


def _lane(run: Run, scale: _Scale, label: str, node: str, y: float, special: bool) -> str:
    shown = escape(label if len(label) <= 13 else label[:12] + "…")
    parts = [tag("text", tag("title", escape(label)), shown, x=LEFT - 10, y=y + 13, class_="axis end")]
    parts.append(tag("rect", x=LEFT, y=y, width=WIDTH - LEFT - RIGHT, height=_LANE, rx=3, class_="track"))
    for attempt in run.attempts:
        spell = attempt.spells.get(node)
        if spell is None:
            continue
        begun = attempt.training_from if spell.steps else spell.ended
        kept = max((t for t, iteration in spell.steps if iteration <= attempt.kept_until), default=begun)
        last = max((t for t, _ in spell.steps), default=begun)
        for low, high, class_ in ((spell.started, begun, "starting"), (begun, kept, "train"), (kept, last, "again")):
            if high > low:
                width = max(1.0, scale.x(high) - scale.x(low))
                parts.append(tag("rect", x=scale.x(low), y=y, width=width, height=_LANE, class_=class_))
        parts.append(_step_marks([t for t, _ in spell.steps], scale, y))
    for interruption in run.interruptions:
        if any(_names(spec, node) for spec in interruption.specs):
            x, middle = scale.x(interruption.broke), y + _LANE / 2
            parts.append(tag("path", d=f"M{x - 5:.1f} {middle - 5}l10 10m0 -10l-10 10", class_="hit"))
    return tag("g", *parts, class_="lane special" if special else "lane")


def _step_marks(times: Sequence[float], scale: _Scale, y: float) -> str:
    """Hair lines between steps, where they are far enough apart to be seen."""
    places = [scale.x(t) for t in times]
    if len(places) < 2 or (places[-1] - places[0]) / len(places) < 2.5:
        return ""
    return tag("path", d="".join(f"M{x:.1f} {y:.0f}v{_LANE}" for x in places[:-1]), class_="steps")
