"""What mteb measured of sentence encoders, read from the folder that it writes, as a table of models by tasks.

Of each task it is the main score, a share, in per cent; the mean over the task's subsets (languages), as mteb itself has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank.errors import DataError
from adarank.io.files import read_json
from adarank.workflow.measured import Measured, add_row, measured_table, named_path
from adarank.workflow.scores import Table

META = "model_meta.json"
_LABELS = ("hf_subset", "languages", "main_score", "evaluation_time")


def read_mteb(sources: Sequence[str]) -> Table:
    """The table of some results of mteb.

    Arguments:
        sources: the folder of one model's results each (`results/ORG__MODEL/REVISION`, or one around it) with a JSON file for each
            task, or one such file; a row's name may stand before it, as in `merged=results/merged`. Else a row is called as
            `model_meta.json` beside the results names the model.

    Raises:
        DataError: there are no results of mteb there, or two rows are of other tasks or metrics.

    Example:
        table = read_mteb(["base=results/base", "merged=results/merged"])
        print(table.rows["merged"])
    """
    rows: dict[str, Mapping[str, Measured]] = {}
    for source in sources:
        name, path = named_path(source)
        files = _files(path)
        scores = dict(_scored(file) for file in files)
        add_row(rows, name or _model(files[0].parent), scores, source)
    return measured_table(rows, "mteb", "mteb")


def _files(path: Path) -> list[Path]:
    """The files of tasks, all of one model.

    Raises:
        DataError: there are none, or of several models.
    """
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*.json") if file.name != META) if path.is_dir() else []
    if not files:
        raise DataError(f"{path}: no results of mteb (a JSON file for each task). Give the folder that mteb wrote.")
    folders = sorted({str(file.parent) for file in files})
    if len(folders) > 1:
        raise DataError(f"{path}: results of {len(folders)} models or revisions, in {', '.join(folders[:4])}. Give one of these folders.")  # fmt: skip
    return files


def _model(folder: Path) -> str:
    """What the results call their model; the folder's name where they do not."""
    return str(read_json(folder / META).get("name") or folder.name)


def _scored(file: Path) -> tuple[str, Measured]:
    """The task of a file, and its score."""
    content = read_json(file)
    task, splits = content.get("task_name"), content.get("scores")
    if not isinstance(task, str) or not isinstance(splits, Mapping) or not splits:
        remedy = "Run mteb 1.11 or newer." if "mteb_dataset_name" in content else "Give the files that mteb wrote."
        raise DataError(f"{file}: no results of mteb: task_name and scores were needed. {remedy}")
    split = "test" if "test" in splits else next(iter(splits))
    subsets = splits[split]
    mains = [entry.get("main_score") for entry in subsets if isinstance(entry, Mapping)] if isinstance(subsets, list) else []  # fmt: skip
    if not mains or not all(isinstance(main, (int, float)) and not isinstance(main, bool) for main in mains):
        raise DataError(f"{file}: split '{split}' has a subset without a main_score. Run mteb again.")
    said = [f"mean of {len(mains)} subsets"] if len(mains) > 1 else []
    said += [f"split {split}"] if split != "test" or len(splits) > 1 else []
    mean = sum(float(main or 0) for main in mains) / len(mains)
    return task, Measured(_metric(subsets[0]), 100 * mean, note=f"{task}: {', '.join(said)}." if said else "")  # fmt: skip


def _metric(subset: Mapping[str, Any]) -> str:
    """Which of a subset's scores is the main one; `main_score` where none of them has its value."""
    main = subset["main_score"]
    return next((str(key) for key, value in subset.items() if key not in _LABELS and value == main), "main_score")
