"""Spectra, overlap and radars of a page: recorded by definition, shown as recorded, said in words."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import adarank
from adarank.report.figures import radar
from adarank.report.scores import score_table
from adarank.spectral.overlap import POINTS
from adarank.workflow.load_tasks import load_tasks
from text_zoo import ADAPT, make_zoo, recipe

TASKS = {"mood": 2, "colour": 3, "size": 2}
KINDS: dict[str, dict[str, Any]] = {
    "soft": {"parameters": {"rank": 0.5, "lambda": 0.7}},
    "binary": {"parameters": {"rank": 0.5, "lambda": 0.7, "mask": "binary"}},
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_zoo(tmp_path_factory.mktemp("spectra"), tasks=TASKS)
    models = [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in TASKS]
    for name, changes in KINDS.items():
        adarank.merge_recipe(recipe(folder, f"{name}.yaml", **{**ADAPT, "models": models, **changes}), folder / name)
    return folder


def spectra_of(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "adarank.json").read_text())["adaptation"]["spectra"]
    return content


def decomposed(zoo: Path, name: str) -> dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor]]]:
    """Matrix -> of each task U, σ, Vᵀ about the output's origin in float64, and σ times mask and λ."""
    masks = adarank.MaskFile.load(zoo / name / "masks.safetensors")
    network = adarank.open_job(adarank.load_recipe(zoo / f"{name}.yaml")).network
    made = {}
    for matrix, mask in masks.masks.items():
        origin = network.origin(matrix, masks.origin).double()  # type: ignore[arg-type]
        parts = mask.double().split(masks.sizes[matrix])
        made[matrix] = [
            (
                *torch.linalg.svd(network.experts[task].read(matrix).double() - origin, full_matrices=False),
                part,
                float(lam),
            )
            for task, part, lam in zip(TASKS, parts, masks.lam[matrix], strict=True)
        ]
    return {n: [(u, s, vh, s * part * lam) for u, s, vh, part, lam in of] for n, of in made.items()}


def rank_of(s: Tensor) -> int:
    squares = (s**2).sort(descending=True).values
    return (
        next((k for k in range(1, len(s) + 1) if squares[:k].sum() >= 0.95 * squares.sum()), 0) if squares.sum() else 0
    )


@pytest.mark.parametrize("name", KINDS)
def test_recorded_ranks_follow_the_definition(zoo: Path, name: str) -> None:
    spectra, matrices = spectra_of(zoo / name), decomposed(zoo, name)
    assert spectra["groups"] == list(TASKS)
    assert spectra["matrices"].keys() == matrices.keys()
    for matrix, parts in matrices.items():
        of = spectra["matrices"][matrix]
        assert of["components"] == [len(s) for _, s, _, _ in parts]
        assert of["rank"] == [rank_of(s) for _, s, _, _ in parts]
        assert of["rank_kept"] == [rank_of(after) for *_, after in parts]
    for place, task in enumerate(TASKS):
        curves = [parts[place] for parts in matrices.values()]
        assert spectra["spectra"][task][0] == 1
        assert len(spectra["spectra"][task]) == POINTS
        first = sum(float(after.abs()[0] / s[0]) for _, s, _, after in curves) / len(curves)
        assert spectra["spectra_kept"][task][0] == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize("name", KINDS)
def test_recorded_overlap_follows_the_definition(zoo: Path, name: str) -> None:
    """Cosines of whole vectors; ‖(UᵀU - I) S (VᵀV - I)‖₁ ÷ Σσ of the r/T components that weigh most."""
    spectra, matrices = spectra_of(zoo / name), decomposed(zoo, name)
    for key, after in (("", False), ("_kept", True)):
        vectors = [[] for _ in TASKS]  # type: ignore[var-annotated]
        for matrix, parts in matrices.items():
            us, ss, vs = [], [], []
            for place, (u, s, vh, weighted) in enumerate(parts):
                values = weighted if after else s
                vectors[place].append(((u * values) @ vh).flatten())
                top = values.abs().argsort(descending=True)[: len(s) // len(TASKS)]
                us.append(u[:, top])
                ss.append(values[top].abs())
                vs.append((vh[top].T * values[top].sign()).T)
            u, s, v = torch.cat(us, 1), torch.cat(ss), torch.cat(vs)
            eye = torch.eye(len(s), dtype=torch.float64)
            expected = ((u.T @ u - eye) @ torch.diag(s) @ (v @ v.T - eye)).abs().sum() / s.sum()
            assert spectra["matrices"][matrix][f"interference{key}"] == pytest.approx(
                float(expected), rel=2e-2, abs=1e-3
            )
        whole = torch.stack([torch.cat(parts) for parts in vectors])
        cosines = (
            torch.corrcoef(whole) * 0 + torch.nn.functional.normalize(whole) @ torch.nn.functional.normalize(whole).T
        )
        torch.testing.assert_close(torch.tensor(spectra[f"cosines{key}"]).double(), cosines, atol=1e-3, rtol=0)


def test_the_page_shows_what_the_record_has(zoo: Path, tmp_path: Path) -> None:
    text = adarank.write_report([zoo / "soft"], tmp_path / "page.html").read_text().replace("<wbr>", "")
    spectra = spectra_of(zoo / "soft")
    for matrix, of in spectra["matrices"].items():
        row = re.search(
            rf'<th scope="row">{re.escape(matrix)}</th>(<td data-value="\d+" style="--k:\d+%">.*?)</tr>', text
        )
        assert row
        cells = [tuple(map(int, pair)) for pair in re.findall(r">(\d+) → (\d+)<", row[1])]
        assert cells == list(zip(of["rank"], of["rank_kept"], strict=True))
        assert f'<td data-value="{of["interference_kept"]}">' in text
    assert f"{spectra['cosines'][0][1]:.3f}" in text
    assert "adarank analyse" not in text
    shares = [
        r / n for of in spectra["matrices"].values() for r, n in zip(of["rank_kept"], of["components"], strict=True)
    ]
    assert f"with masks and λ in {100 * sum(shares) / len(shares):.1f}%" in text


def test_a_method_without_masks_says_where_to_look(zoo: Path, tmp_path: Path) -> None:
    models = [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in TASKS]
    adarank.merge_recipe(recipe(zoo, "cart.yaml", models=models), tmp_path / "cart")
    lam = {"models": models, "merge_method": "adamerging", "adapt": {"steps": 2, "batch_size": 4}}
    adarank.merge_recipe(recipe(zoo, "lambda.yaml", **lam), tmp_path / "lambda")
    text = adarank.write_report([tmp_path / "cart", tmp_path / "lambda"], tmp_path / "page.html").read_text()
    assert text.count("adarank analyse interference RECIPE") == 4
    assert "The record does not hold" not in text


@given(st.lists(st.one_of(st.none(), st.floats(-50, 400)), min_size=3, max_size=20))
def test_a_radars_corners_are_as_far_out_as_their_share(values: list[float | None]) -> None:
    view: Any = radar("Shares.", [f"t{n}" for n in range(len(values))], {"model": values})
    most = min(125.0, max(100.0, *(value or 0.0 for value in values)))
    centre = view["size"] / 2
    hundred = [tuple(map(float, corner.split(","))) for corner in view["rings"][3]["points"].split()]
    for corner, value, ring in zip(view["series"][0]["points"].split(), values, hundred, strict=True):
        x, y = map(float, corner.split(","))
        reach = math.dist((x, y), (centre, centre)) / math.dist(ring, (centre, centre))
        assert reach == pytest.approx(min(max(value or 0.0, 0.0), most) / 100, abs=0.01)
        assert 0 <= x <= view["size"]
    assert all(f"t{n} {'none' if v is None else f'{v:.1f}'}" in view["label"] for n, v in enumerate(values))


def test_scores_have_a_radar_where_there_are_experts() -> None:
    rows = {"experts": {"a": 80.0, "b": 90.0, "c": 50.0}, "out": {"a": 40.0, "b": 90.0, "c": 60.0}}
    scores = {
        "split": "test",
        "protocol": "disjoint",
        "counts": {"a": 10, "b": 10, "c": 10},
        "rows": rows,
        "summary": {name: {"mean": 1.0, "normalised": 1.0} for name in rows},
    }
    assert "out: a 50.0, b 100.0, c 120.0" in score_table(scores)["radar"]["label"]
    assert score_table({**scores, "rows": {"out": rows["out"]}})["radar"] is None
    assert radar("", ["a", "b"], {"out": [1.0, 2.0]}) is None


@pytest.mark.parametrize("by", ["model", "block"])
def test_whom_a_change_of_masks_harmed_is_measured(zoo: Path, tmp_path: Path, by: str) -> None:
    """Two merges by masks, one with the strongest direction put back, and their predictions beside the experts'."""
    models = [{"model": f"models/{task}", "task": {"name": task, "data": f"data/{task}.tsv"}} for task in TASKS]
    moved = recipe(
        zoo, "moved.yaml", **{**ADAPT, "models": models, "adapt": {**ADAPT["adapt"], "keep": "last", "by": by}}
    )
    adarank.merge_recipe(moved, tmp_path / "moved")
    effect = json.loads((tmp_path / "moved" / "adarank.json").read_text())["adaptation"]["strongest_change"]
    matrix, whose = effect["tensor"], effect["task"]
    masks = adarank.MaskFile.load(tmp_path / "moved" / "masks.safetensors")
    places = [(n, t, sum(sizes[:i])) for n, sizes in masks.sizes.items() for i, t in enumerate(masks.tasks)]
    values = {(name, task): float(masks.masks[name][first]) for name, task, first in places}
    assert values[matrix, whose] == min(values.values()) == pytest.approx(effect["mask"], abs=1e-5)
    put_back = masks.masks[matrix].clone()
    put_back[next(first for name, task, first in places if (name, task) == (matrix, whose))] = 1
    changes = dict.fromkeys(TASKS, 0.0)
    for which, of_matrix, sign in (("kept", masks.masks[matrix], 1), ("whole", put_back, -1)):
        file = tmp_path / f"{which}.safetensors"
        replace(masks, masks={**masks.masks, matrix: of_matrix}).save(file)
        again = recipe(zoo, f"{which}.yaml", models=models, merge_method="masked", parameters={"masks": str(file)})
        adarank.merge_recipe(again, tmp_path / which)
        for task, data in load_tasks(adarank.open_job(adarank.load_recipe(moved))).items():
            batch = data.examples.batch(data.splits.rows["select"])
            expert = transformers.AutoModelForSequenceClassification.from_pretrained(zoo / "models" / task).eval()
            with torch.no_grad():
                p, q = (m(**batch).logits.double().log_softmax(-1) for m in (expert, adarank.load_task(tmp_path / which, task)))  # fmt: skip
            apart = float((p.exp() * (p - q)).sum(-1).mean())
            assert effect["divergence"][task][which] == pytest.approx(apart, abs=1e-5)
            changes[task] += sign * apart
    text = adarank.write_report([tmp_path / "moved"], tmp_path / "page.html").read_text()
    assert "measured by putting it back whole" in text
    most = max(changes, key=lambda task: changes[task])
    raised = re.search(r"raised (\w+)(?:'|&#39;)s divergence from its expert the most, by ([\d.]+)", text)
    assert (raised is not None) == (changes[most] > 5e-5)
    assert raised is None or (raised[1] == most and float(raised[2]) == pytest.approx(changes[most], abs=6e-5))
