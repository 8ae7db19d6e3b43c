"""Records of what was measured: one file of JSON lines per test bed or subject, which the tables of the docs are made from.

A line is one record. Its `kind`, `study`, `name` and `seed`, as far as it has them, are its key: to write a record replaces
the one with its key, and no other. Numbers have six digits, more than anything here is measured to. Blocks (`SHARED`) that several
records have alike stand once, in lines of the kind "shared" at the head of the file; a record names its own by the beginning of
their SHA-256. Who reads records gets them whole.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent.parent / "records"
KEY = ("kind", "study", "name", "seed")
SHARED = ("inputs", "rows_per_split", "versions", "machine", "settings")
SIGNALS = {"agreement": 1, "divergence": -1, "histogram": -1, "entropy": -1}  # of judgements: which way is better
Record = dict[str, Any]


class Records:
    """The records of one file, which may not exist yet.

    Example:
        >>> records = Records(FOLDER / "costs.jsonl")
        >>> records.write({"kind": "cost", "name": "step", "seconds": 1.5})
        >>> records.find(kind="cost", name="step")
        [{'kind': 'cost', 'name': 'step', 'seconds': 1.5}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, **fields: Any) -> list[Record]:
        """The records whose fields have these values, in the order of the file.

        Raises:
            ValueError: a line is no JSON object, names a shared block that is not there, or two have one key.
        """
        return [record for record in self._read() if all(record.get(name) == value for name, value in fields.items())]

    def first(self, **fields: Any) -> Record | None:
        """The first of these records; None without one."""
        return next(iter(self.find(**fields)), None)

    def write(self, record: Record) -> None:
        """Put `record` in the place of the one with its key, or at the end."""
        with _alone_in(self.path.parent):
            records = {key_of(other): other for other in self._read()}
            records[key_of(record)] = rounded(record)
            text = "".join(
                json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in _lines(records)
            )
            partial = self.path.with_suffix(".partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path)

    def _read(self) -> list[Record]:
        blocks: dict[str, Any] = {}
        records: dict[tuple[Any, ...], Record] = {}
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        lines = (
            text.removesuffix("\n").split("\n") if text else []
        )  # not splitlines: strings may hold other ends of lines
        for number, line in enumerate(lines, 1):
            where = f"{self.path}, line {number}"
            try:
                record = json.loads(line)
                if record["kind"] == "shared":
                    blocks[record["name"]] = record["value"]
                    continue
                record |= {field: blocks[record[field]] for field in SHARED if isinstance(record.get(field), str)}
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where}: is no record ({error!r}). Restore the file from the history.") from None
            if key_of(record) in records:
                raise ValueError(f"{where}: a second record of {key_of(record)}. Delete one of the two lines.")
            records[key_of(record)] = record
        return list(records.values())


def key_of(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(field) for field in KEY)


def rounded(value: Any, digits: int = 6) -> Any:
    """The same plain data, numbers with so many digits."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {name: rounded(part, digits) for name, part in value.items()}
    return [rounded(part, digits) for part in value] if isinstance(value, list | tuple) else value


def _lines(records: Mapping[tuple[Any, ...], Record]) -> Iterator[Record]:
    """Blocks that several records have alike, in the order of their first use, then the records, with names in the place of these."""
    names = {
        key: {field: _name(record[field]) for field in SHARED if field in record} for key, record in records.items()
    }
    uses = Counter(name for of_one in names.values() for name in of_one.values())
    blocks: dict[str, Any] = {}
    lines = []
    for key, record in records.items():
        named = {field: name for field, name in names[key].items() if uses[name] > 1}
        blocks |= {name: record[field] for field, name in named.items()}
        lines.append({**record, **named})
    yield from ({"kind": "shared", "name": name, "value": value} for name, value in blocks.items())
    yield from lines


def _name(block: Any) -> str:
    return hashlib.sha256(json.dumps(block, ensure_ascii=False).encode()).hexdigest()[:12]


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other process writes records in `folder` meanwhile; it is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def columns(
    values: Mapping[str, Mapping[str, float]], tasks: Iterable[str], names: Iterable[str]
) -> dict[str, list[float]]:
    """Name -> its value for each of these tasks in turn, of task -> name -> value."""
    order = list(tasks)
    return {name: [values[task][name] for task in order] for name in names}


def summary(report: Mapping[str, Any], rows_per_split: Mapping[str, Any]) -> Record:
    """What a record keeps of the report of an adaptation, a training or statistics: all but what every step and every matrix came to.

    The judgements are those of what was kept: of a step, of a point on the line to it, or of each task's step. They
    and the shares of the largest class are lists over the tasks, in the order of the splits. Splits are left out where they
    are the test bed's.
    """
    dropped = {"losses", "kept", "judged", "way_back", "spectra", "blocks", "strongest_change"}
    content = {name: value for name, value in report.items() if name not in dropped}
    if "heads" in content:
        content["heads"] = _columns_of_heads(content["heads"], rows_per_split)
    if content.get("splits") == rows_per_split:
        del content["splits"]
    if "largest_class_share" in content:
        shares = content["largest_class_share"]
        content["largest_class_share"] = columns(shares, rows_per_split, next(iter(shares.values())))
    if report.get("judged"):
        content["judged_kept"] = columns(_kept(report), rows_per_split, SIGNALS)
        judged_on = set(report["judged_on"].values())
        content["judged_on"] = judged_on.pop() if len(judged_on) == 1 else report["judged_on"]
    return content


def _columns_of_heads(heads: Mapping[str, Mapping[str, Any]], tasks: Iterable[str]) -> dict[str, list[Any]]:
    """Name -> what learning each task's head gave, in the order of the tasks; None for a task that learned none."""
    order = list(tasks)
    names = dict.fromkeys(name for task in order for name in heads.get(task, {}))
    return {name: [heads.get(task, {}).get(name) for task in order] for name in names}


def _kept(report: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """Task -> signals of what was kept."""
    judged, step, share = report["judged"], report["step_kept"], report.get("share_kept", 1.0)
    if "steps_kept" in report:
        return {task: judged[str(its_step)][task] for task, its_step in report["steps_kept"].items()}
    if share == 1.0:
        return dict(judged[str(step)])
    points = (point["judged"] for point in report["way_back"] if (point["step"], point["share"]) == (step, share))
    return dict(next(points))
