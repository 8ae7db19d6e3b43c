"""Line charts as SVG: small, without a library, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_MOST_POINTS = 120
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 320, 130, 46, 20, 8, 10


@dataclass(frozen=True)
class Chart:
    """One series of numbers over steps.

    Attributes:
        label: what the figure shows, in words and numbers, for those who do not see it.
        steps, values: the points, in the order of the steps.
        kind: `agreement` (in per cent, with a dot at every point) or `loss`.
        kept: the step that was kept.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    kind: str
    kept: float | None = None

    def view(self) -> dict[str, object]:
        """What the template draws: the path, the dots, the axes' ends and the mark, in the units of the view box."""
        steps, values = thinned(self.steps, self.values)
        low, high = (min(0.0, *values), max(0.0, *values)) if self.kind == "loss" else _span(values)
        high = high if high > low else low + 1
        last = max(*self.steps, self.kept or 0, 1)

        def x(step: float) -> float:
            return round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last, 1)

        def y(value: float) -> float:
            return round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low), 1)

        points = [(x(step), y(value)) for step, value in zip(steps, values, strict=True)]
        return {
            "label": self.label,
            "kind": self.kind,
            "path": " ".join(f"{across},{down}" for across, down in points),
            "dots": points if self.kind == "agreement" else [],
            "low": f"{low:.3g}",
            "high": f"{high:.3g}",
            "last": f"{last:g}",
            "kept": None if self.kept is None else x(self.kept),
            "box": (_WIDTH, _HEIGHT, _LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM),
        }


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis in per cent: 20 points apart or more, so that chance does not look like a change."""
    middle, half = (min(values) + max(values)) / 2, max(10.0, (max(values) - min(values)) / 2)
    low = min(max(0.0, middle - half), 100 - 2 * half)
    return max(0.0, low), max(0.0, low) + 2 * half


def thinned(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most 120 points: means over neighbours where there are more."""
    size = -(-len(values) // _MOST_POINTS)
    starts = range(0, len(values), size)
    return (
        [sum(part) / len(part) for start in starts if (part := list(steps[start : start + size]))],
        [sum(part) / len(part) for start in starts if (part := list(values[start : start + size]))],
    )


_RADAR, _REACH = 340, 135


def radar(label: str, tasks: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> dict[str, object] | None:
    """A radar of per cent, an axis per task; None of fewer than three tasks, which make no area.

    Arguments:
        label: what the figure shows; each series' numbers are said after it.
        series: name -> a number per task, None where there is none: it is drawn at the centre. Beyond 125 is drawn at 125.
    """
    if len(tasks) < 3:
        return None
    known = [value for values in series.values() for value in values if value is not None]
    most = min(125.0, max(100.0, *known)) if known else 100.0
    centre = _RADAR / 2

    def at(number: int, value: float) -> tuple[float, float]:
        angle = 2 * math.pi * number / len(tasks)
        reach = _REACH * max(0.0, min(value, most)) / most
        return round(centre + reach * math.sin(angle), 1), round(centre - reach * math.cos(angle), 1)

    def closed(values: Sequence[float]) -> str:
        return " ".join(f"{x},{y}" for x, y in (at(number, value) for number, value in enumerate(values)))

    said = [
        f"{name}: "
        + ", ".join(f"{task} {'none' if v is None else f'{v:.1f}'}" for task, v in zip(tasks, values, strict=True))
        for name, values in series.items()
    ]
    labels = []
    for number, task in enumerate(tasks):
        across, up = math.sin(2 * math.pi * number / len(tasks)), math.cos(2 * math.pi * number / len(tasks))
        x, y = centre + 1.12 * _REACH * across, centre - 1.12 * _REACH * up
        side = "middle" if abs(across) < 0.2 else "start" if across > 0 else "end"
        labels.append(
            {"x": round(x, 1), "y": round(y + 5 - 7 * up, 1), "side": side, "task": task}
        )  # clear of the ring
    return {
        "label": f"{label} {'; '.join(said)}.",
        "size": _RADAR,
        "rings": [{"points": closed([share] * len(tasks)), "share": share} for share in (25, 50, 75, 100)],
        "spokes": [(centre, centre, *at(number, most)) for number in range(len(tasks))],
        "labels": labels,
        "series": [
            {"name": name, "points": closed([value or 0.0 for value in values])} for name, values in series.items()
        ],
    }


def spectrum(label: str, before: Sequence[float], after: Sequence[float]) -> dict[str, object]:
    """Two curves over the rank, from 0 to the largest of both."""
    high = max(*before, *after, 1e-12)
    box = (_WIDTH, _HEIGHT, _LEFT, _TOP, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM)

    def path(values: Sequence[float]) -> str:
        step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(values) - 1)
        reach = _HEIGHT - _TOP - _BOTTOM
        return " ".join(
            f"{_LEFT + step * place:.1f},{_TOP + reach * (high - max(0.0, value)) / high:.1f}"
            for place, value in enumerate(values)
        )

    return {"label": label, "before": path(before), "after": path(after), "high": f"{high:.2g}", "box": box}
