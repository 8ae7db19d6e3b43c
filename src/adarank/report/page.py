"""From outputs to one HTML file that needs nothing else: no network, no other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from adarank import __version__
from adarank.errors import OutputError
from adarank.io.hub import local_path
from adarank.io.lock import resolved
from adarank.io.writer import write_text
from adarank.report.content import sections
from adarank.report.read import Output, read_output
from adarank.report.scores import score_table
from adarank.report.summary import loop_block

_MARK = "<!-- a page of adarank -->"
_TEMPLATES = Path(__file__).parent / "template"


def page_of(out: Path) -> Path:
    """Where the page of an output lies: beside its folder, with its name."""
    place = resolved(out)
    place = place if place.name else place.resolve()  # such as "."
    return place.parent / f"{place.name}.html"


def check_page(page: Path, force: bool = False, outputs: Sequence[Path] = ()) -> None:
    """Refuse a page that would overwrite something, before any work is done.

    Raises:
        OutputError: something is there and `force` is not given, or it is no page of adarank's; or the page would lie
            in an output, which would no longer be as it was recorded.
    """
    local_path(page, kind=OutputError)
    inside = [out for out in outputs if page.resolve().is_relative_to(out.resolve())]
    if inside:
        raise OutputError(f"{page}: lies in the output {inside[0]}, which stays as it was written. Give another path.")
    if not page.exists():
        return
    if page.is_dir() or not page.read_bytes()[:200].decode("utf-8", "replace").startswith(_MARK):
        raise OutputError(f"{page}: is there, and is no page of adarank. Give another path.")
    if not force:
        raise OutputError(f"{page}: already exists. Give another path, or --force to replace it.")


def write_report(
    outputs: Sequence[str | Path],
    page: str | Path | None = None,
    scores: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Path:
    """Write one HTML page of one or several outputs, from their records and masks alone.

    Arguments:
        outputs: folders that `merge` wrote.
        page: the file to write; by default beside the first output, `OUT.html`.
        scores: what `adarank evaluate --json` printed, as data, for a table of tasks and models.
        force: replace a page that is there already.

    Returns:
        The page.

    Raises:
        CheckpointError: an output has no record, or one that cannot be read.
        DataError: `scores` are something else.
        OutputError: the page is there already, or it would lie in an output.

    Example:
        page = adarank.write_report(["merged"], "merged-page.html")
    """
    folders = [Path(out) for out in outputs]
    read = [read_output(out) for out in folders]
    place = Path(page) if page is not None else page_of(folders[0])
    check_page(place, force, folders)
    write_text(place, rendered(read, scores))
    return place


def rendered(outputs: Sequence[Output], scores: Mapping[str, Any] | None = None) -> str:
    """The page's text."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"breakable": _breakable, "fixed": _fixed}
    return environment.get_template("page.html").render(
        mark=_MARK,
        version=__version__,
        outputs=[sections(output) for output in outputs],
        compared=compared(outputs) if len(outputs) > 1 else None,
        scores=score_table(scores) if scores is not None else None,
        style=(_TEMPLATES / "style.css").read_text(encoding="utf-8"),
        script=(_TEMPLATES / "page.js").read_text(encoding="utf-8"),
    )


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line behind each of its parts, and within none."""
    return Markup(re.sub(r"([._/])(?=.)", r"\1<wbr>", str(escape(name))))


def _fixed(number: float, digits: int) -> str:
    """A number with so many decimals; what rounds to zero has no minus."""
    return f"{round(number, digits) + 0.0:.{digits}f}"


def compared(outputs: Sequence[Output]) -> list[dict[str, Any]]:
    """A row per output: what can be put side by side."""
    rows = []
    for output in outputs:
        record, loop = output.record, loop_block(output.record) or {}
        plan = record.get("plan") or {}
        rows.append(
            {
                "name": output.name,
                "method": plan.get("merge_method"),
                "step": loop.get("step_kept"),
                "kept": None if output.masks is None else round(100 * output.masks.kept_share(), 1),
                "bytes": plan.get("output_bytes"),
                "seconds": record.get("seconds"),
            }
        )
    return rows
