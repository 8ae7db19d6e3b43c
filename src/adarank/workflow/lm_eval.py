"""What lm-evaluation-harness measured, read from the JSON that it writes, as a table of models by tasks.

Of each task it is the metric that the harness reports first. Shares are in per cent, as everywhere here; perplexities and their
like are as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adarank.data.metrics import less_is_better
from adarank.errors import DataError
from adarank.io.files import read_json
from adarank.workflow.measured import Measured, add_row, measured_table, named_path
from adarank.workflow.scores import Table

SOURCE = "lm-evaluation-harness"
_WHOLE = frozenset({"bleu", "chrf", "ter"})  # the harness has them in per cent already


def read_lm_eval(sources: Sequence[str]) -> Table:
    """The table of some results of lm-evaluation-harness.

    Arguments:
        sources: a file that its `--output_path` got, or the folder around it, each; a row's name may stand before it, as in
            `experts=results/a.json`. Else a row is called as the model that the file names.

    Raises:
        DataError: a file is none of the harness, or two files are of other tasks, metrics or numbers of inputs.

    Example:
        table = read_lm_eval(["base=results/base.json", "merged=results/merged.json"])
        print(table.rows["merged"])
    """
    rows: dict[str, Mapping[str, Measured]] = {}
    for source in sources:
        name, file = _named(source)
        content = read_json(file)
        add_row(rows, name or _model(content, file), _scores(content, file), source)
    return measured_table(rows, SOURCE, "lm_eval")


def _named(source: str) -> tuple[str, Path]:
    """A row's name, empty if none is given, and its file."""
    name, path = named_path(source)
    if path.is_dir():
        files = sorted(path.rglob("results*.json"))
        if len(files) != 1:
            raise DataError(f"{path}: {len(files)} files results*.json in it, and one was needed. Name the file.")
        return name, files[0]
    if not path.is_file():
        raise DataError(f"{path}: no such file. Give the JSON that lm_eval --output_path wrote.")
    return name, path


def _model(content: Mapping[str, Any], file: Path) -> str:
    """What a file calls its model: its path, or the file's name."""
    config = content.get("config")
    given = config.get("model_args") if isinstance(config, Mapping) else None
    named = given.get("pretrained") if isinstance(given, Mapping) else None
    matched = re.search(r"(?:^|,)pretrained=([^,]+)", given) if isinstance(given, str) else None
    return str(named or (matched and matched.group(1)) or content.get("model_name") or file.stem)


def _scores(content: Mapping[str, Any], file: Path) -> dict[str, Measured]:
    """Task -> score; of a group of tasks the group's alone, where it has one."""
    results = content.get("results")
    if not isinstance(results, Mapping):
        raise DataError(f"{file}: no results of lm-evaluation-harness. Give the JSON that lm_eval --output_path wrote.")
    metrics = {task: _metrics(listed) for task, listed in results.items() if isinstance(listed, Mapping)}
    groups = content.get("group_subtasks")
    inside = {
        task
        for group, members in (groups.items() if isinstance(groups, Mapping) else ())
        if metrics.get(group) and isinstance(members, (list, tuple))
        for task in members
        if task != group
    }
    scores = {
        task: _score(task, listed, _inputs(content, task))
        for task, listed in metrics.items()
        if listed and task not in inside
    }
    if not scores:
        raise DataError(f"{file}: no task in it has a score.")
    return scores


def _metrics(listed: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> value of one task, in the order of the file; a filter's name stands behind its metric."""
    values = {}
    for key, value in listed.items():
        metric, _, chosen = str(key).partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if number and "stderr" not in metric and metric not in ("samples", "sample_len", "name", "alias"):
            values[metric if chosen in ("", "none") else f"{metric} {chosen}"] = float(value)
    return values


def _score(task: str, values: Mapping[str, float], inputs: int) -> Measured:
    (metric, value), *others = values.items()
    share = not less_is_better(metric) and metric.split()[0] not in _WHOLE and 0 <= value <= 1
    note = f"{task}: {metric}; the harness also has {', '.join(name for name, _ in others)}." if others else ""
    return Measured(metric, 100 * value if share else value, inputs, note)


def _inputs(content: Mapping[str, Any], task: str) -> int:
    counts = content.get("n-samples")
    count = counts.get(task) if isinstance(counts, Mapping) else None
    effective = count.get("effective") if isinstance(count, Mapping) else None
    return effective if isinstance(effective, int) else 0
