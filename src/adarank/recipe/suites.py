"""The papers' benchmarks as recipes: which models on the hub, which data, classes and prompts, which published figures beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from adarank.adapt.presets import PRESETS
from adarank.errors import RecipeError
from adarank.recipe.papers import ROWS, TABLES, PaperRow
from adarank.settings import nearest

Protocol = Literal["transductive", "disjoint"]
REFERENCES = {"Pretrained": "base", "Individual": "experts"}  # row of the papers -> what every evaluation shows
_FOLDER = Path(__file__).parent / "suite_files"


@dataclass(frozen=True)
class Published:
    """A table of figures that somebody else measured, per cent.

    Attributes:
        source: where it stands.
        checkpoints: the family of checkpoints that it is of.
        scores: row -> task, as the suite calls it -> figure.
        means: row -> mean over the tasks.
        note: what must be known of it.
    """

    name: str
    source: str
    checkpoints: str
    scores: Mapping[str, Mapping[str, float]]
    means: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """A benchmark.

    Attributes:
        name, title: its key, and what it is in words.
        kind: what the networks do.
        checkpoints: the family of its checkpoints; `about` says whose they are.
        base: the model that its experts were fine-tuned from.
        experts: task -> expert on the hub.
        tasks: task -> data, columns, classes, prompts, metric, as under a recipe's `task`.
        paper_names: task -> what the papers call it.
        notes: what must be known of its models and tasks, in sentences.
        presets: row -> the released settings that AdaRank runs with here.
        published: tables that may stand beside it, those of its own checkpoints first.
    """

    name: str
    title: str
    kind: str
    checkpoints: str
    about: str
    base: str
    experts: Mapping[str, str]
    tasks: Mapping[str, Mapping[str, Any]]
    paper_names: Mapping[str, str]
    notes: tuple[str, ...]
    presets: Mapping[str, str]
    published: tuple[Published, ...]

    def recipe(
        self,
        row: PaperRow,
        protocol: Protocol = "transductive",
        limit: int | None = None,
        steps: int | None = None,
        device: str = "auto",
    ) -> dict[str, Any]:
        """What makes a row of the papers with this suite's models and data, as a recipe's content.

        Arguments:
            protocol: `transductive` adapts on the inputs that are scored, as the papers do.
            limit: use at most this many inputs of a task.
            steps: take so many steps in place of the papers'.

        Raises:
            RecipeError: the row adapts on a share of the inputs that are scored, and the protocol on none.
        """
        content: dict[str, Any] = dict(row.recipe)
        of_row = content.pop("data", {})
        if of_row and protocol != "transductive":
            raise RecipeError(
                f"{row.name}: adapts on a share of the inputs that are scored, which --protocol {protocol} does not. Leave the row or the protocol out."
            )
        preset = self.presets.get(row.like or row.name)
        if preset and "adapt" in content:
            content["adapt"] = {**content["adapt"], "preset": preset}
        elif preset:  # what adaptation starts from
            start = PRESETS[preset]["parameters"]
            content["parameters"] = {key: start[key] for key in content["parameters"]}
        if steps is not None and "adapt" in content:
            content["adapt"] = {**content["adapt"], "steps": steps}
        more = {} if limit is None else {"limit": limit}
        whole = protocol == "transductive"  # every input is scored, and adapted on; else some for each
        models = [
            {"model": self.experts[task], "task": {
                "name": task, "kind": self.kind, **spec, "data": {"test": spec["data"]} if whole else spec["data"], **more,
            }}
            for task, spec in self.tasks.items()
        ]  # fmt: skip
        return {
            **content, "base_model": self.base, "models": models, "data": {"protocol": protocol, **of_row}, "device": device,
        }  # fmt: skip


def suites() -> dict[str, str]:
    """Suite -> what it is, in words."""
    return {name: content["title"] for name, content in _read("suites")["suites"].items()}


def suite(name: str) -> Suite:
    """A suite by its name.

    Raises:
        RecipeError: there is none of this name.

    Example:
        print(suite("glue-7-gpt2").experts["cola"])
    """
    content = _read("suites")
    if name not in content["suites"]:
        raise RecipeError(f"reproduce: unknown suite '{name}'.{nearest(name, content['suites'])}")
    given = content["suites"][name]
    known = _read(given["tasks_file"])
    tasks = {task: known[task] for task in given["tasks"]}
    paper_names = {task: of["paper"] for task, of in tasks.items()}
    specs = {task: {key: value for key, value in of.items() if key not in ("paper", "note")} for task, of in tasks.items()}  # fmt: skip
    for task, split in given.get("splits", {}).items():
        specs[task] = {**specs[task], "data": {**specs[task]["data"], "split": split}}
    for task, classes in given.get("classes", {}).items():
        specs[task] = {**specs[task], "classes": classes}
    experts = {task: given["expert"].format(task=task, paper=paper_names[task]) for task in tasks} | given.get(
        "experts", {}
    )
    notes = [
        *([f"{given['note']}."] if "note" in given else []),
        *(f"{task}: {of['note']}." for task, of in tasks.items() if "note" in of),
    ]
    return Suite(
        name, given["title"], given["kind"], given["checkpoints"], content["checkpoints"][given["checkpoints"]], given["base"],
        experts, specs, paper_names, tuple(notes),
        given["presets"], tuple(_published(table, paper_names) for table in given["published"]),
    )  # fmt: skip


def rows(names: list[str] | None = None) -> list[PaperRow]:
    """Rows of the papers' tables that a recipe makes without labels, or those that are named, singly or by a table of theirs.

    Variants of a row (what is learned, on how many inputs) are made where they are named.

    Raises:
        RecipeError: there is no such row, or no recipe makes it.

    Example:
        >>> [row.name for row in rows(["Data budget"])]
        ['TA+AdaRank, 1% of data', 'TA+AdaRank']
    """
    made = {row.name: row for row in ROWS if row.recipe}
    if not names:
        return [row for row in made.values() if row.recipe["merge_method"] != "multitask" and not row.like]
    by_name = {name.lower(): [row] for name, row in made.items()}
    by_name |= {table.lower(): [made[name] for name in of] for table, of in TABLES.items()}
    chosen: list[PaperRow] = []
    for name in names:
        if name in REFERENCES:
            raise RecipeError(f"--row {name}: is scored with every row. Name another, or none for all.")
        if name.lower() not in by_name:
            raise RecipeError(f"--row {name}: no such row.{nearest(name, (*made, *TABLES))}")
        chosen += [row for row in by_name[name.lower()] if row not in chosen]
    return chosen


def families() -> dict[str, str]:
    """Family of checkpoints -> whose they are."""
    return dict(_read("suites")["checkpoints"])


def _published(name: str, paper_names: Mapping[str, str]) -> Published:
    table = _read("published")[name]
    place = {paper: index for index, paper in enumerate(table["tasks"])}
    scores = {
        row: {
            task: values[place[paper]]
            for task, paper in paper_names.items()
            if paper in place and values[place[paper]] is not None
        }
        for row, values in table["rows"].items()
    }
    means = {row: values[-1] for row, values in table["rows"].items() if values[-1] is not None}
    return Published(
        name, table["source"], table["checkpoints"], scores, {**means, **table.get("means", {})}, table.get("note", "")
    )


@cache
def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((_FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return content
