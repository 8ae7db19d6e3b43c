"""Line charts as SVG: small, without a library, coloured by the page's style sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MOST_POINTS = 120
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 320, 130, 38, 20, 8, 10


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
