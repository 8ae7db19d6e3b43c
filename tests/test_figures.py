"""The numbers of `adarank analyse`, each against its definition, computed here from the checkpoints alone."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import adarank
from adarank.analysis.figure import Row
from adarank.workflow.analyse import Options, analyse
from text_zoo import ADAPT, TASKS, make_zoo, recipe


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("figures"))
    adarank.merge_recipe(recipe(folder, "adarank.yaml", **ADAPT), folder / "merged")
    recipe(folder)
    return folder


@pytest.fixture(scope="module")
def weights(zoo: Path) -> dict[str, dict[str, Tensor]]:
    """Model -> its tensors in float64, under the base's names."""
    read = {name: load_file(zoo / "models" / name / "model.safetensors") for name in ("base", *TASKS)}
    names = set(read["base"])
    return {
        model: {n.removeprefix("bert."): t.double() for n, t in of.items() if n.removeprefix("bert.") in names}
        for model, of in read.items()
    }


def origin_of(weights: dict[str, dict[str, Tensor]], name: str, kind: str) -> Tensor:
    """The base's tensor, or the experts' mean."""
    return weights["base"][name] if kind == "pretrained" else torch.stack([weights[t][name] for t in TASKS]).mean(0)


def rows_of(zoo: Path, figure: str, out: Path, settings: dict[str, Any] | None = None, **options: Any) -> list[Row]:
    """A figure's rows."""
    return list(analyse(figure, zoo / "recipe.yaml", out, settings, Options(image="none", **options)).rows)


@pytest.mark.parametrize("energy", [0.95, 0.6])
def test_effective_ranks_follow_the_definition(
    energy: float, zoo: Path, weights: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    rows = rows_of(zoo, "ranks", tmp_path / "ranks", {"energy": energy})
    assert len({row["tensor"] for row in rows}) == 13  # the pooler is in no layer
    assert {row["origin"] for row in rows} == {"pretrained", "average"}
    for row in rows:
        delta = weights[row["task"]][row["tensor"]] - origin_of(weights, row["tensor"], row["origin"])
        squares = torch.linalg.svd(delta).S ** 2
        fewest = next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= energy * squares.sum())
        assert row["effective_rank"] == fewest
        assert row["components"] == min(delta.shape)
        assert row["norm"] == pytest.approx(float(delta.norm()), rel=1e-5)
        inside = row["tensor"].partition("layer.")[2]
        assert row["layer"] == (int(inside[0]) if inside else None)


def test_interference_follows_the_definition(zoo: Path, weights: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """‖(UᵀU - I) S (VᵀV - I)‖₁ of the top half of each task vector."""
    rows = [row for row in rows_of(zoo, "interference", tmp_path / "i") if row["kind"] == "interference"]
    assert rows
    for row in rows:
        tasks = list(TASKS) if row["task"] == "all" else [row["task"], row["other"]]
        origin = origin_of(weights, row["tensor"], row["origin"])
        parts = [torch.linalg.svd(weights[task][row["tensor"]] - origin, full_matrices=False) for task in tasks]
        half = min(origin.shape) // 2
        u = torch.cat([part.U[:, :half] for part in parts], dim=1)
        v = torch.cat([part.Vh[:half] for part in parts])
        s = torch.cat([part.S[:half] for part in parts])
        identity = torch.eye(len(s), dtype=torch.float64)
        expected = ((u.T @ u - identity) @ torch.diag(s) @ (v @ v.T - identity)).abs().sum()
        assert row["value"] == pytest.approx(float(expected), rel=1e-3)
        assert row["relative"] == pytest.approx(float(expected / s.sum()), rel=1e-3)


def test_inner_products_make_the_cosines_of_whole_vectors(
    zoo: Path, weights: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    rows = [row for row in rows_of(zoo, "interference", tmp_path / "i") if row["kind"] == "inner_product"]
    merged = {row["tensor"] for row in rows}
    for kind in ("pretrained", "average"):
        sums: dict[tuple[str, str], float] = {}
        for row in rows:
            if row["origin"] == kind:
                pair = (row["task"], row["other"])
                sums[pair] = sums.get(pair, 0.0) + row["value"]
        whole = {
            task: torch.cat([(weights[task][n] - origin_of(weights, n, kind)).flatten() for n in sorted(merged)])
            for task in TASKS
        }
        for one, other in combinations(TASKS, 2):
            expected = torch.nn.functional.cosine_similarity(whole[one], whole[other], dim=0)
            cosine = sums[one, other] / (sums[one, one] * sums[other, other]) ** 0.5
            assert cosine == pytest.approx(float(expected), abs=1e-4)


def test_masks_are_those_of_the_file(zoo: Path, tmp_path: Path) -> None:
    rows = rows_of(zoo, "masks", tmp_path / "masks", outputs=[zoo / "merged"])
    file = adarank.MaskFile.load(zoo / "merged" / "masks.safetensors")
    assert len(rows) == sum(mask.numel() for mask in file.masks.values())
    for row in rows:
        place = list(file.tasks).index(row["task"])
        part = file.masks[row["tensor"]].split(file.sizes[row["tensor"]])[place]
        assert row["mask"] == float(part[row["component"] - 1])
        assert row["lambda"] == float(file.lam[row["tensor"]][place])
        assert row["kept"] == (row["mask"] >= 0.5)
