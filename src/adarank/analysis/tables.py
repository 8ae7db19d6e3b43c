"""A figure's rows as a file: CSV or Parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from adarank.analysis.figure import Row
from adarank.errors import OutputError


def check_available(kind: str) -> None:
    """Raise an `OutputError` if what writes this kind of file is not there."""
    if kind == "parquet":
        try:
            import pyarrow.parquet  # noqa: F401  # imported on use: only Parquet files need it
        except ImportError:
            raise OutputError(
                "pyarrow is not installed, which writes Parquet. Install adarank[data], or give --data csv."
            ) from None


def encoded(rows: Sequence[Row], kind: str) -> bytes:
    """The rows as a file's content; numbers whole, so that nothing is lost to rounding.

    Arguments:
        kind: `csv` or `parquet`.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if kind == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row.get(column) for column in columns] for row in rows)
        return text.getvalue().encode()
    import pyarrow
    import pyarrow.parquet

    content = io.BytesIO()
    table = pyarrow.table({column: [row.get(column) for row in rows] for column in columns})
    pyarrow.parquet.write_table(table, content)
    return content.getvalue()
