"""The small pictures of a report: where the time went, how long saves made training wait, the loss. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

from resilience.observe.phrases import human_seconds, plural
from resilience.observe.svg import HATCH, LEFT, RIGHT, WIDTH, picture, tag, ticks
from resilience.observe.timeline import Spent


def spent_bar(spent: Spent) -> str:
    """Where the time went, as one bar."""
    kinds = spent_kinds(spent)
    x, parts = 0.0, [HATCH]
    for class_, label, seconds in kinds:
        width = WIDTH * seconds / spent.wall if spent.wall else 0.0
        if width > 0:
            box = tag(
                "rect",
                tag("title", f"{label}: {human_seconds(seconds)}"),
                x=x,
                y=0,
                width=width,
                height=30,
                class_=class_,
            )
            parts.append(box)
        x += width
    words = ", ".join(f"{label} {human_seconds(seconds)}" for _, label, seconds in kinds)
    return picture("spent", "Where the time went", words, 30, *parts)


def spent_kinds(spent: Spent) -> list[tuple[str, str, float]]:
    """(class, label, seconds), the useful part first."""
    return [
        ("train", "Training that counts", spent.useful),
        ("again", "Training that was lost and done again", spent.again),
        ("stalled", "Training waited for saves", spent.stalled),
        ("starting", "Starting, recovering, and all else", spent.away),
    ]


def restart_bar(parts_s: Sequence[tuple[str, str, float]]) -> str:
    """The time from what broke to the next new step, in parts (class, label, seconds)."""
    total = sum(seconds for _, _, seconds in parts_s) or 1.0
    x, parts = 0.0, [HATCH]
    for class_, label, seconds in parts_s:
        width = WIDTH * seconds / total
        parts.append(
            tag(
                "rect",
                tag("title", escape(f"{label}: {human_seconds(seconds)}")),
                x=x,
                y=0,
                width=width,
                height=14,
                class_=class_,
            )
        )
        x += width
    words = ", ".join(f"{label} {human_seconds(seconds)}" for _, label, seconds in parts_s)
    return picture("restart", "From the fault to the next step", words, 14, *parts)


def stall_plot(stalls: Sequence[float], middle: float) -> str:
    """How long each save made training wait, on a logarithmic axis: a dot per save, bars when there are many."""
    low = math.floor(math.log10(max(min(stalls), 1e-6)) * 2) / 2
    high = max(math.ceil(math.log10(max(*stalls, 1e-6)) * 2) / 2, low + 0.5)

    def x_of(seconds: float) -> float:
        return 40 + (math.log10(max(seconds, 1e-6)) - low) / (high - low) * (WIDTH - 80)

    columns: dict[int, int] = {}
    for stall in stalls:
        place = round(x_of(stall) / 14)
        columns[place] = columns.get(place, 0) + 1
    tallest = max(columns.values())
    dots = tallest <= 9
    base = 40.0 + 12.5 * tallest if dots else 140.0
    parts = list(_columns(columns, base, dots, tallest))
    x = x_of(middle)
    parts.append(tag("line", x1=x, x2=x, y1=8, y2=base + 4, class_="median"))
    anchor = "end" if x > WIDTH * 0.8 else "start"
    parts.append(
        tag(
            "text",
            f"median {human_seconds(middle)}",
            x=x + (8 if anchor == "start" else -8),
            y=18,
            class_=f"axis {anchor}",
        )
    )
    parts.append(tag("line", x1=0, x2=WIDTH, y1=base + 4, y2=base + 4, class_="grid"))
    for exponent in range(math.ceil(low * 2), math.floor(high * 2) + 1):
        seconds = 10 ** (exponent / 2) if exponent % 2 == 0 else 3 * 10 ** ((exponent - 1) / 2)
        parts.append(tag("text", human_seconds(seconds), x=x_of(seconds), y=base + 22, class_="axis middle"))
    ends = f"shortest {human_seconds(stalls[0])}, median {human_seconds(middle)}, longest {human_seconds(stalls[-1])}"
    words = f"{plural(len(stalls), 'save')}: {ends}"
    return picture("stalls", "How long saves made training wait", words, base + 30, *parts)


def _columns(columns: dict[int, int], base: float, dots: bool, tallest: int) -> Iterable[str]:
    for place, count in sorted(columns.items()):
        if dots:
            for level in range(count):
                yield tag("circle", cx=place * 14, cy=base - 7 - level * 12.5, r=5, class_="dot")
        else:
            height = max(2.0, count / tallest * 110)
            yield tag("rect", x=place * 14 - 6, y=base - height, width=12, height=height, class_="dot")


def loss_curve(
    metrics: Sequence[tuple[float, int, float]],
    undisturbed: Sequence[tuple[float, int, float]] = (),
    attempts: Sequence[tuple[float, int]] = (),
) -> str:
    """Loss by iteration; what was done twice is drawn twice, and lies on itself when both times were the same.

    `undisturbed`: of a run to which nothing happened, drawn behind it. `attempts`: when each set in, and how many ranks
    it had; a new piece of the line begins with each.
    """
    height, bottom = 190.0, 160.0
    told = [*metrics, *undisturbed]
    last = max(iteration for _, iteration, _ in told)
    low, high = min(loss for _, _, loss in told), max(loss for _, _, loss in told)
    high = high if high > low else low + 1.0

    def place(iteration: int, loss: float) -> tuple[float, float]:
        x = LEFT + iteration / max(1, last) * (WIDTH - LEFT - RIGHT)
        return x, bottom - (loss - low) / (high - low) * (bottom - 14)

    parts = []
    for loss in ticks(low, high, 4):
        y = place(0, loss)[1]
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", f"{loss:g}", x=LEFT - 10, y=y + 4, class_="axis end"))
    for iteration in ticks(0, last, 6):
        parts.append(
            tag("text", f"{iteration:,.0f}", x=place(int(iteration), low)[0], y=bottom + 22, class_="axis middle")
        )
    if undisturbed:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(at, loss) for _, at, loss in undisturbed))
        parts.append(tag("polyline", points=path, class_="climb undisturbed"))
    sizes = {ranks for _, ranks in attempts if ranks}
    for ranks, run in _pieces(metrics[:: max(1, len(metrics) // 1000)], attempts):
        points = [place(iteration, loss) for iteration, loss in run]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(tag("polyline", points=path, class_="climb"))
        parts.append(tag("circle", cx=points[0][0], cy=points[0][1], r=4.5, class_="resumed"))
        if len(sizes) > 1 and ranks:
            x, y = points[0]
            parts.append(tag("text", plural(ranks, "rank"), x=x + 7, y=max(12.0, y - 8), class_="axis start"))
    words = (
        f"Loss {metrics[0][2]:.3g} at iteration {metrics[0][1]}, {metrics[-1][2]:.3g} at iteration {metrics[-1][1]}."
    )
    return picture("loss", "Loss by iteration", words, height, *parts)


def _pieces(
    metrics: Sequence[tuple[float, int, float]], attempts: Sequence[tuple[float, int]]
) -> list[tuple[int, list[tuple[int, float]]]]:
    """The line in pieces: one for each time that training set in, with its ranks (0: not known)."""
    pieces: list[tuple[int, list[tuple[int, float]]]] = []
    before, of = -1, -1
    for t, iteration, loss in metrics:
        attempt = sum(began <= t for began, _ in attempts) - 1
        if not pieces or iteration <= before or attempt != of:
            pieces.append((attempts[attempt][1] if attempt >= 0 else 0, []))
        pieces[-1][1].append((iteration, loss))
        before, of = iteration, attempt
    return pieces
