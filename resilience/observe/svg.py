"""SVG as text: elements, pictures with a title and a description, round ticks. Pure.

Colours are classes (`assets/report.css` gives them, for light and dark).
"""

from __future__ import annotations

import math
from html import escape

WIDTH = 1000
#: Room for the labels of the vertical axis, and to the right of the plot.
LEFT, RIGHT = 92, 14

HATCH = (
    '<defs><pattern id="again" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="again-back" width="5" height="5"/><rect class="again-line" width="2" height="5"/></pattern>'
    '<pattern id="starting" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect class="starting-line" width="1" height="4"/></pattern></defs>'
)


def tag(name: str, *children: str, **attributes: object) -> str:
    """One element. Attribute names: `_` becomes `-`, a trailing one is dropped (`class_`)."""
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"' for key, value in attributes.items()
    )
    return f"<{name}{given}>{''.join(children)}</{name}>"


def _number(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def picture(name: str, title: str, description: str, height: float, *children: str) -> str:
    return tag(
        "svg",
        tag("title", escape(title), id=f"{name}-title"),
        tag("desc", escape(description), id=f"{name}-desc"),
        *children,
        class_=f"chart {name}",
        viewBox=f"0 0 {WIDTH} {height:.0f}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        xmlns="http://www.w3.org/2000/svg",
    )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    if high <= low:
        return [low]
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(seconds: float, about: int) -> list[tuple[float, str]]:
    """Ticks at round seconds, minutes or hours, with their labels."""
    unit, suffix = next(
        ((unit, suffix) for limit, unit, suffix in ((180, 1, "s"), (10_800, 60, "min")) if seconds <= limit),
        (3600, "h"),
    )
    return [(value * unit, f"{value:g} {suffix}") for value in ticks(0, seconds / unit, about)]
