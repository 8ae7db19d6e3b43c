"""Rows from files: TSV, CSV, JSONL, Parquet, npz, image folders, or a `datasets` dataset, as columns of Python values."""

from __future__ import annotations

import csv
import lzma
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adarank.data.spec import HubData
from adarank.errors import DataError
from adarank.io.hub import local_path
from adarank.io.parsing import parse_json, repetition

Table = dict[str, Sequence[Any]]
"""Column name -> values, all of one length."""

# What the readers of tables, arrays and archives raise on bytes that they did not expect.
UNREADABLE = (
    ValueError,
    OSError,
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    EOFError,
    MemoryError,
    csv.Error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


def read_table(
    source: str | HubData, folder: Path, columns: Sequence[str], optional: Sequence[str] = (), paths: bool = False
) -> Table:
    """Read the columns of a file or dataset.

    Arguments:
        source: a path (relative ones count from `folder`) or a dataset on the hub.
        columns: names that must be there.
        optional: names that are read if they are there (labels of an adapt file).
        paths: text in `columns` is the path of a file; relative ones count from the data file's folder.

    Raises:
        DataError: no such file, an unknown format, a damaged file or a missing column.
    """
    label, table = _read_hub(source, folder) if isinstance(source, HubData) else _read_file(source, folder)
    lost = [name for name in columns if name not in table]
    if lost:
        raise DataError(
            f"{label}: no column {', '.join(map(repr, lost))}; it has {', '.join(map(repr, table))}. Name the columns under task: columns."
        )
    chosen = {name: table[name] for name in [*columns, *optional] if name in table}
    if len(next(iter(chosen.values()))) == 0:
        raise DataError(f"{label}: no rows.")
    if paths and Path(label).is_file():
        near = Path(label).parent
        chosen |= {name: [_anchored(value, near) for value in chosen[name]] for name in columns}
    return chosen


def _anchored(value: Any, folder: Path) -> Any:
    """A relative path counted from `folder`, alone or as `datasets` stores it; anything else as it is."""
    if isinstance(value, str):
        return str(folder / value)
    if isinstance(value, Mapping) and not value.get("bytes") and isinstance(value.get("path"), str):
        return {**value, "path": str(folder / value["path"])}
    return value


def _read_file(source: str, folder: Path) -> tuple[str, Table]:
    path = local_path(source, folder, DataError)
    if not path.exists():
        raise DataError(f"{path}: no such data file. Relative paths count from the recipe's folder.")
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"{path}: neither a file nor a folder. Save the data in a file first.")
    readers: dict[str, Callable[[Path], Table]] = {
        ".tsv": _read_tsv,
        ".csv": _read_csv,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".npz": _read_npz,
    }
    reader: Callable[[Path], Table]
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        reader = _read_saved if saved else _image_folder
    elif path.suffix in readers:
        reader = readers[path.suffix]
    else:
        raise DataError(
            f"{path}: format '{path.suffix}' is not known. Give {', '.join(readers)} or a folder of images, one sub-folder a class."
        )
    try:
        return str(path), reader(path)
    except UNREADABLE as error:
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error}). Check the file.") from None


def _read_tsv(path: Path) -> Table:
    """Tab-separated, without quoting: a quotation mark is text, as in the GLUE files."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return _columns(list(csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)))


def _read_csv(path: Path) -> Table:
    with path.open(encoding="utf-8-sig", newline="") as handle:
        return _columns(list(csv.reader(handle)))


def _columns(rows: list[list[str]]) -> Table:
    if not rows:
        raise ValueError("the file is empty")
    header, *body = [row for row in rows if row]  # a blank line is no row
    _refuse_twice(header)
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} fields, the header {len(header)}")
    return {name: [row[i] for row in body] for i, name in enumerate(header)}


def _refuse_twice(columns: Sequence[str]) -> None:
    repeated = repetition(columns)
    if repeated is not None:
        raise ValueError(f"the column {columns[repeated]!r} is there twice")


def _read_jsonl(path: Path) -> Table:
    # not splitlines: U+2028 and its like are ordinary characters of a JSON string
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from None
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no object")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for number, row in enumerate(rows, start=1):
        if set(row) != set(names):
            raise ValueError(f"row {number} lacks {sorted(set(names) - set(row))}")
    return {name: [row[name] for row in rows] for name in names}


def _read_parquet(path: Path) -> Table:
    import pyarrow.parquet  # imported on use: only Parquet files need it

    _refuse_twice(pyarrow.parquet.read_schema(path).names)
    table = pyarrow.parquet.read_table(path)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _read_npz(path: Path) -> Table:
    with np.load(path, allow_pickle=False) as arrays:
        _refuse_twice(arrays.files)
        table = {name: arrays[name] for name in arrays.files}
    if any(array.ndim == 0 for array in table.values()):
        raise ValueError("an array without rows")
    lengths = {name: len(array) for name, array in table.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays of different lengths: {lengths}")
    return table


def _image_folder(path: Path) -> Table:
    """One sub-folder a class, sorted by name; images are given as paths."""
    files = [(f, f.parent.name) for f in sorted(path.glob("*/*")) if f.suffix.lower() in _IMAGES]
    if not files:
        raise DataError(
            f"{path}: no rows. A folder of images needs one sub-folder a class with {', '.join(_IMAGES)} files in it."
        )
    return {"image": [str(f) for f, _ in files], "label": [c for _, c in files]}


def _read_saved(path: Path) -> Table:
    """A folder that `save_to_disk` of `datasets` wrote."""
    rows = _datasets(str(path)).load_from_disk(str(path))
    if isinstance(rows, dict):
        raise DataError(f"{path}: holds the splits {', '.join(rows)}. Name one of these sub-folders.")
    return _plain(rows)


def _datasets(label: str) -> Any:
    try:
        import datasets  # an extra: only its own datasets need it
    except ImportError:
        raise DataError(f"dataset '{label}' needs the package `datasets`: pip install 'adarank[data]'.") from None
    return datasets


def _plain(rows: Any) -> Table:
    """Columns of a dataset. Its images stay encoded: decoded ones would not fit into memory, nor tell a file by its bytes."""
    import datasets

    for name, feature in rows.features.items():
        if isinstance(feature, datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return {name: rows[name] for name in rows.column_names}


def _read_hub(source: HubData, folder: Path) -> tuple[str, Table]:
    datasets = _datasets(source.dataset)
    name = str(folder / source.dataset) if (folder / source.dataset).is_dir() else source.dataset
    try:
        # versions before 4 would ask on the terminal whether to run a dataset's script
        rows = datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision, trust_remote_code=False
        )
    except Exception as error:  # datasets raises many unrelated classes
        raise DataError(
            f"dataset '{source.dataset}': could not be loaded ({type(error).__name__}: {error}). Check name, config, split and network."
        ) from error
    return f"dataset '{source.dataset}'", _plain(rows)
