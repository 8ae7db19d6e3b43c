"""Drawing with matplotlib: colours that colour-blind people tell apart (Okabe and Ito), each with a mark of its own; small SVG.

Okabe and Ito, "Color Universal Design", 2008. Maps are cividis (one sign) and PuOr (two signs), which keep their order in grey too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

from adarank.errors import OutputError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8F8F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", ":", "-.")
_MISSING = "matplotlib is not installed, which draws figures. Install adarank[report], or give --image none for the data alone."
_STYLE = {
    "svg.fonttype": "none",  # text stays text: smaller, and read by those who do not see it
    "svg.hashsalt": "adarank",
    "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def check_available() -> None:
    """Raise an `OutputError` if matplotlib is not there."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OutputError(_MISSING) from None


def grid(rows: int, columns: int, width: float, height: float, polar: bool = False) -> tuple[Any, Any]:
    """A figure of rows × columns axes, each of so many inches: (figure, axes[row][column]). Of 7 inches it is legible on a telephone."""
    from matplotlib.figure import Figure as Drawn

    figure = Drawn(figsize=(width * columns, height * rows))
    kind = {"projection": "polar"} if polar else {}
    return figure, figure.subplots(rows, columns, squeeze=False, subplot_kw=kind)


def lines(
    axis: Any,
    series: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    title: str = "",
    errors: Mapping[str, Sequence[float]] | None = None,
    dashes: Mapping[str, str] | None = None,
    outlined: bool = False,
) -> None:
    """A line per series, each with its colour and mark; with `errors` a bar at every point; outlined where they lie on a map."""
    for number, (name, points) in enumerate(series.items()):
        across, up = [x for x, _ in points], [y for _, y in points]
        how: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)], "label": name,
               "linestyle": (dashes or {}).get(name, DASHES[number // len(COLOURS) % len(DASHES)])}  # fmt: skip
        if outlined:
            axis.plot(across, up, color="white", linewidth=2.6, linestyle=how["linestyle"])
            how |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "markersize": 4.5}
        if errors is None:
            axis.plot(across, up, **how)
        else:
            axis.errorbar(across, up, yerr=errors[name], capsize=2, **how)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_title(title)


def heat(
    axis: Any,
    cells: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Mapping[float, str],
    title: str,
    across: str = "",
    ends: tuple[float, float] | None = None,
    signed: bool = False,
    bar: bool = True,
) -> None:
    """A map of numbers: rows named, columns with the ticks given as place -> name.

    Arguments:
        cells: NaN stays empty.
        ends: of the colours; by default the least and the largest number, of signed ones the same on both sides. The bar
            has a point where numbers lie beyond.
    """
    numbers = [value for row in cells for value in row if not isnan(value)] or [0.0]
    most = max(map(abs, numbers)) or 1.0
    low, high = ends or ((-most, most) if signed else (min(numbers), max(numbers)))
    image = axis.imshow(
        cells, aspect="auto", interpolation="none", cmap="PuOr" if signed else "cividis", vmin=low, vmax=high
    )
    named = [place for place, name in enumerate(rows) if name]
    axis.set_yticks(named, [rows[place] for place in named])
    axis.set_xticks(list(columns), list(columns.values()))
    axis.grid(False)
    axis.set_title(title)
    axis.set_xlabel(across)
    if bar:
        beyond = ("neither", "min", "max", "both")[(min(numbers) < low) + 2 * (max(numbers) > high)]
        scale = axis.figure.colorbar(image, ax=axis, fraction=0.04, pad=0.02, extend=beyond)
        scale.solids.set_rasterized(True)  # as paths its colours take more room than the map


def contours(axis: Any, heights: Mapping[tuple[float, float], float], title: str) -> None:
    """Heights over a grid of places, filled between lines of equal height."""
    from matplotlib.ticker import MaxNLocator

    across, up = (sorted({place[side] for place in heights}) for side in (0, 1))
    cells = [[heights[x, y] for x in across] for y in up]
    filled = axis.contourf(across, up, cells, levels=12, cmap="cividis")
    filled.set_rasterized(True)
    scale = axis.figure.colorbar(filled, ax=axis, fraction=0.05, pad=0.02, ticks=MaxNLocator(4))
    scale.solids.set_rasterized(True)
    axis.grid(False)
    axis.set_title(title)


def layer_ticks(layers: Sequence[Any]) -> dict[float, str]:
    """Where each layer begins among matrices in order -> its number."""
    begins = {place: layer for place, layer in enumerate(layers) if place == 0 or layers[place - 1] != layer}
    shown = {float(place): str(layer) for place, layer in begins.items() if layer is not None}
    step = -(-len(shown) // 12)
    return dict(list(shown.items())[:: max(1, step)])


def legend_below(figure: Any, axis: Any) -> None:
    """One legend for all axes of a figure, beneath them, of what one of them has."""
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))


def rendered(draw: Callable[[], Any], kind: str) -> bytes:
    """What `draw` gives, as a file's content: the same bytes for the same rows.

    Arguments:
        kind: `svg` or `png`.
    """
    import matplotlib

    content = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        draw().savefig(
            content, format=kind, dpi=100 if kind == "svg" else 150, metadata={"Date": None} if kind == "svg" else None
        )
    return compact(content.getvalue()) if kind == "svg" else content.getvalue()


def compact(svg: bytes) -> bytes:
    """An SVG that looks the same in half the room; its words stay as they are.

    Coordinates have two digits after the point in place of six, and the one family of fonts stands once. Names of groups,
    groups of a single element, rotations by nothing and indentation are left out.
    """

    def rounded(number: re.Match[str]) -> str:
        return f"{float(number.group()):.2f}".rstrip("0").rstrip(".")

    text = re.sub(r"\n\s+", "\n", svg.decode("utf-8"))
    text = re.sub(r'="[^"]*"', lambda value: re.sub(r"-?\d+\.\d{3,}", rounded, value.group()), text)
    fonts = re.compile(r" font-family: ([^;]*);")
    named = fonts.search(text)
    if named:
        text = fonts.sub("", text).replace("<svg ", f'<svg font-family="{named.group(1)}" ', 1)
    text = re.sub(r' transform="rotate\(-?0 [^"]*\)"', "", text)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    alone, count = re.compile(r"<g>\n(<(?:use|text|path|image)\b[^>]*>(?:[^<]*</text>)?)\n</g>"), 1
    while count:
        text, count = alone.subn(r"\1", text)
    return text.encode("utf-8")
