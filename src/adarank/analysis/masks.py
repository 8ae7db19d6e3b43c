"""Masks of adapted outputs as maps: tasks by singular components, of the first, a middle and the last layer.

Figure 5 of AdaRank (Lee et al. 2025, arXiv:2503.22178). Binary masks are 0 and 1; soft ones any number, and those of weak
components often a large one, so that colours end at -2 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from adarank.analysis import drawing
from adarank.analysis.bench import Bench
from adarank.analysis.figure import Figure, Row, mean, values_of, where
from adarank.errors import CheckpointError, MismatchError
from adarank.spectral.mask_file import FILE, MaskFile
from adarank.spectral.masks import kept

_ACROSS = 3  # maps in a line
_COLUMNS = 64  # of a map at most; neighbours are averaged where there are more components


class Masks(Figure):
    """What each singular component is multiplied by."""

    name: ClassVar[str] = "masks"
    summary: ClassVar[str] = "what adapted outputs keep: masks of every matrix, task and singular component"
    source: ClassVar[str] = "AdaRank, Figure 5"
    data: ClassVar[str] = ""
    outputs: ClassVar[str] = "adapted outputs, which have a masks file"

    top: float = Field(
        0.5, gt=0, le=1, description="share of the components that is drawn, strongest first; the data have all"
    )

    def check(self, bench: Bench) -> None:
        """Refuse outputs without masks, or of other tasks."""
        super().check(bench)
        for folder in bench.outputs.values():
            if not (folder / FILE).exists():
                raise CheckpointError(
                    f"{folder}: has no {FILE}, as its method learns no masks. Give an adapted output."
                )
            masks = MaskFile.load(folder / FILE)
            lost = [task for task in bench.tasks if task not in masks.tasks]
            if lost:
                raise MismatchError(
                    f"{folder}: has no masks of task {', '.join(map(repr, lost))}. Give an output of this recipe's models."
                )

    def parts(self, bench: Bench) -> list[str]:
        """The outputs."""
        return list(bench.outputs)

    def cost(self, bench: Bench) -> Mapping[str, int]:
        """Files that are read."""
        return {"masks files": len(bench.outputs)}

    def compute(self, bench: Bench, part: str) -> list[Row]:
        """One output: a row per matrix, task and component."""
        masks = MaskFile.load(bench.outputs[part] / FILE)
        rows: list[Row] = []
        for name, mask in masks.masks.items():
            for task, values, lam in zip(
                masks.tasks, mask.split(masks.sizes[name]), masks.lam[name].tolist(), strict=True
            ):
                for index, (value, stays) in enumerate(
                    zip(values.float().tolist(), kept(values).tolist(), strict=True)
                ):
                    rows.append(
                        {
                            "output": part,
                            "tensor": name,
                            "layer": bench.layer(name),
                            "task": task,
                            "component": index + 1,
                            "of": values.numel(),
                            "mask": value,
                            "kept": stays,
                            "lambda": lam,
                        }
                    )
        return rows

    def sentences(self, rows: Sequence[Row]) -> list[str]:
        """Shares that are kept: of all, of the strongest components, by layer."""
        said = []
        for output in values_of(rows, "output"):
            here = where(rows, output=output)
            strongest = where(here, component=1)
            layers = [row["layer"] for row in here if row["layer"] is not None]
            ends = (
                f"; {_share(where(here, layer=min(layers)))} in layer {min(layers)}, {_share(where(here, layer=max(layers)))} in layer {max(layers)}"
                if layers
                else ""
            )
            said.append(
                f"{output}: {_share(here)} of all components kept, {_share(strongest)} of the strongest ones{ends}"
            )
        return said

    def draw(self, rows: Sequence[Row]) -> Any:
        """Maps of the matrices of the first, a middle and the last layer of each output, three in a line."""
        lines: list[list[list[Row]]] = []
        for output in values_of(rows, "output"):
            for layer in _three(where(rows, output=output)):
                here = where(rows, output=output, layer=layer)
                maps = [where(here, tensor=name) for name in values_of(here, "tensor")]
                lines += [maps[first : first + _ACROSS] for first in range(0, len(maps), _ACROSS)]
        figure, axes = drawing.grid(len(lines), max(map(len, lines)), 2.3, 1.5)
        soft = any(not 0 <= float(row["mask"]) <= 1 for row in rows)
        for line, maps in zip(axes, lines, strict=True):
            for column, axis in enumerate(line):
                if column < len(maps):
                    self._map(axis, maps[column], soft, column, last=column == len(maps) - 1)
                else:
                    axis.set_axis_off()
        return figure

    def _map(self, axis: Any, rows: Sequence[Row], soft: bool, column: int, last: bool) -> None:
        tasks = values_of(rows, "task")
        cells = [[float(row["mask"]) for row in where(rows, task=task)] for task in tasks]
        width = max(1, round(self.top * max(map(len, cells))))
        padded = np.array([line[:width] + [0.0] * (width - len(line)) for line in cells])
        groups = np.array_split(padded, min(width, _COLUMNS), axis=1)
        shown = np.stack([group.mean(axis=1) for group in groups], axis=1).tolist()
        output, name = str(rows[0]["output"]), str(rows[0]["tensor"])
        title = f"{output}: {_short(name)}" if column == 0 else _short(name)
        ticks = {0.0: "1", len(groups) - 1.0: str(width)}
        drawing.heat(axis, shown, tasks if column == 0 else [""] * len(tasks), ticks, title,
                     ends=(-2.0, 2.0) if soft else (0.0, 1.0), signed=soft, bar=last)  # fmt: skip


def _share(rows: Sequence[Row]) -> str:
    return f"{100 * mean([float(bool(row['kept'])) for row in rows]):.1f}%"


def _three(rows: Sequence[Row]) -> list[Any]:
    """The first, a middle and the last layer; None stands for matrices outside of layers, where there are no others."""
    layers = sorted({row["layer"] for row in rows if row["layer"] is not None})
    return list(dict.fromkeys([layers[0], layers[len(layers) // 2], layers[-1]])) if layers else [None]


def _short(name: str) -> str:
    """The end of a tensor's name, from its layer's number on."""
    parts = name.removesuffix(".weight").split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), max(0, len(parts) - 2))
    return ".".join(parts[number:])
