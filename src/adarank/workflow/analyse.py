"""Analyses: a figure's numbers from a recipe's models and data, as a table and drawn.

Everything is checked first, and what will be computed is said. Parts are kept as they are done, so that the same command
goes on after an interruption.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from adarank.analysis import drawing, tables
from adarank.analysis.bench import Bench, Measured
from adarank.analysis.figure import Figure, Row
from adarank.analysis.figures import figure_of
from adarank.data.spec import Split
from adarank.data.task import TaskData
from adarank.errors import OutputError, Problems, RecipeError
from adarank.io.hub import local_path
from adarank.io.lock import resolved
from adarank.io.output_folder import RECORD, remove_ours
from adarank.io.progress import advance, stage
from adarank.io.record import Clock, Note, machine, versions
from adarank.io.writer import locked, state_folder
from adarank.models import TaskModels
from adarank.recipe.job import Job
from adarank.recipe.paths import portable
from adarank.recipe.reader import RecipeLike
from adarank.settings import parse
from adarank.workflow.build_networks import build_models
from adarank.workflow.evaluate import ScoredOutput, Scoring, open_output
from adarank.workflow.left_over import state_of_analysis
from adarank.workflow.listed_files import ListedFiles
from adarank.workflow.load_tasks import load_opened
from adarank.workflow.prepare import check_labels, open_recipe, whole

DataKind = Literal["csv", "parquet"]
ImageKind = Literal["svg", "png", "none"]


@dataclass(frozen=True)
class Options:
    """What an analysis is asked for beside its figure's settings.

    Attributes:
        outputs: folders that `merge` wrote, where the figure takes them.
        split: what is scored.
        limit: score at most so many inputs per task, evenly spread over the split.
        data, image: the kinds of files that are written.
    """

    outputs: Sequence[Path] = ()
    split: Split = "test"
    limit: int | None = None
    data: DataKind = "csv"
    image: ImageKind = "svg"


@dataclass(frozen=True)
class Analysed:
    """What an analysis came to.

    Attributes:
        parts, cost: how many parts there are, and what they compute.
        rows: the table; none where nothing was to be computed.
        sentences: what the rows say.
        files: what was written.
    """

    figure: str
    parts: int
    cost: Mapping[str, int]
    rows: Sequence[Row] = ()
    sentences: Sequence[str] = ()
    files: Sequence[Path] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


def analyse(
    name: str,
    recipe: RecipeLike,
    out: Path | str | None = None,
    settings: Mapping[str, Any] | None = None,
    options: Options = Options(),
    force: bool = False,
    dry_run: bool = False,
    note: Note = lambda text: None,
) -> Analysed:
    """Compute a figure's numbers and write them: `OUT.csv` or `.parquet`, `OUT.svg` or `.png`, and the record `OUT.json`.

    Arguments:
        name: a figure, of `analysis.figures.FIGURES`.
        recipe: its file, a mapping with the same keys, or what `load_recipe` returns. Its models and data are what counts.
        out: where to write, by default the figure's name; a suffix of a kind of file is taken for that kind.
        settings: of the figure.
        dry_run: say what would be computed, and compute nothing.
        note: called with a line of text as each stage begins.

    Raises:
        AdaRankError: anything wrong with figure, settings, recipe, data, outputs or files, before anything is computed.

    Example:
        adarank.analyse("ranks", "recipe.yaml", "ranks.svg")
    """
    kind = figure_of(name)
    files, options = _files(Path(out) if out is not None else Path(name), options)
    problems = Problems()
    with problems.noted():
        figure = parse(kind, settings or {}, f"settings of '{name}'")
    with problems.noted():
        files.check(force)
    with problems.noted():
        tables.check_available(options.data)
        if options.image != "none":
            drawing.check_available()
    bench = _opened(kind, recipe, options, files.state, problems)
    problems.refuse()
    figure.check(bench)
    parts, cost = figure.parts(bench), figure.cost(bench)
    if dry_run:
        return Analysed(name, len(parts), cost)
    note(f"{name}: {figure.summary} ({figure.source})")
    note(f"{len(parts)} parts: " + ", ".join(f"{count:,} {what}" for what, count in cost.items()))
    if figure.data and bench.job.recipe.heads == "learn":
        note("Networks have the experts' heads; heads are learned by merge alone")
    with locked(files.record):
        files.check(force)
        return _computed(figure, bench, parts, options, files, note)


def _computed(
    figure: Figure, bench: Bench, parts: Sequence[str], options: Options, files: ListedFiles, note: Note
) -> Analysed:
    """What `analyse` does, once its files are this run's alone."""
    clock = Clock()
    note("Hashing the inputs")
    actions = {name: choice.action for name, choice in bench.network.choices.items()}
    about = {
        "figure": figure.name,
        "settings": figure.model_dump(mode="json", by_alias=True),
        "split": bench.split if figure.data else None,
        "limit": options.limit,
        "inputs": bench.job.inputs(),
        "tensors": hashlib.sha256(json.dumps(actions).encode()).hexdigest(),  # what happens to each, as `select` says
        "metrics": {task: of.metric for task, of in bench.data.items()},
        "data": {task: of.fingerprint() for task, of in bench.data.items()},
        "outputs": {n: hashlib.sha256((path / RECORD).read_bytes()).hexdigest() for n, path in bench.outputs.items()},
    }
    identity = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    with state_folder(files.state):
        folder = files.state / identity
        folder.mkdir(exist_ok=True)
        rows = _all_rows(figure, bench, parts, folder / "parts.jsonl")
        sentences = figure.sentences(rows)
        contents = {files.made[0]: tables.encoded(rows, options.data)}
        if options.image != "none":
            contents[files.made[1]] = drawing.rendered(partial(figure.draw, rows), options.image)
        record = {
            **about,
            "sentences": sentences,
            "recipe": portable(bench.job.recipe),
            "versions": versions(),
            "machine": machine(bench.job.recipe.device),
            **clock.spent(),
        }
        files.write(contents, record)
    remove_ours(files.state)
    cost = figure.cost(bench)
    return Analysed(figure.name, len(parts), cost, rows, sentences, (*files.made, files.record), record)


def _all_rows(figure: Figure, bench: Bench, parts: Sequence[str], kept: Path) -> list[Row]:
    """The rows of all parts in order; those that are kept are not computed again."""
    done = _kept(kept)
    rows: list[Row] = []
    with bench.one_svd(), stage(f"Computing {figure.name}", len(parts)), kept.open("a", encoding="utf-8") as file:
        for part in parts:
            if part not in done:
                with stage(part):
                    done[part] = figure.compute(bench, part)
                file.write(json.dumps([part, done[part]], ensure_ascii=False) + "\n")
                file.flush()
            rows += done.pop(part)
            advance()
    return rows


def _kept(file: Path) -> dict[str, list[Row]]:
    """Part -> its rows, of an interrupted run; a line that a kill cut off is of a part that is computed again."""
    done: dict[str, list[Row]] = {}
    if not file.is_file():
        return done
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    whole_lines = [line for line in lines if line.endswith("\n")]
    if len(whole_lines) < len(lines):
        file.write_text("".join(whole_lines), encoding="utf-8")
    for line in whole_lines:
        part, rows = json.loads(line)
        done[part] = rows
    return done


def _files(out: Path, options: Options) -> tuple[ListedFiles, Options]:
    """What is written, and the options with the kind of file that a suffix names."""
    local_path(out, kind=OutputError)
    for kind in ("csv", "parquet"):
        if out.suffix == f".{kind}":
            out, options = out.with_suffix(""), replace(options, data=kind)
    for image in ("svg", "png"):
        if out.suffix == f".{image}":
            out, options = out.with_suffix(""), replace(options, image=image)
    if not out.name or out.is_dir():
        raise OutputError(
            f"{out}: is not the name of files, which an analysis writes. Give a name such as figures/ranks."
        )
    place = resolved(out)
    table, drawn, record = (place.with_name(f"{place.name}.{kind}") for kind in (options.data, options.image, "json"))
    made = (table,) if options.image == "none" else (table, drawn)
    return ListedFiles(made, record, state_of_analysis(place), "analyse", "an analysis"), options


def _opened(kind: type[Figure], recipe: RecipeLike, options: Options, state: Path, problems: Problems) -> Bench:
    """What the figure is computed with; all that is wrong is raised at once."""
    if options.limit is not None and options.limit < 1:
        problems.errors.append(RecipeError(f"--limit {options.limit}: at least one input is needed."))
    if options.outputs and not kind.outputs:
        problems.errors.append(RecipeError(f"{kind.name}: takes no outputs. Leave --output out."))
    opened = open_recipe(recipe, problems)
    data: Mapping[str, TaskData] = load_opened(opened, problems) if opened and kind.data else {}
    check_labels(data, options.split, problems)
    outputs: dict[str, ScoredOutput] = {}
    for path in options.outputs if kind.outputs else ():
        with problems.noted():
            local_path(path)
            if opened and opened.job:
                outputs[str(path)] = open_output(path, opened.job)
    job = whole(opened, problems)
    if options.limit is not None:
        data = {task: of.spread(options.split, options.limit) for task, of in data.items()}
    return _bench(job, data, outputs, options.split, state)


def _bench(
    job: Job, data: Mapping[str, TaskData], outputs: Mapping[str, ScoredOutput], split: Split, state: Path
) -> Bench:
    loaded: list[TaskModels] = []

    def load() -> TaskModels:
        loaded.extend([] if loaded else [build_models(job)])
        return loaded[0]

    def scoring() -> Scoring:
        return Scoring(job, load(), data, split, losses=True)

    def measured(score: Callable[[Scoring], Mapping[str, Any]]) -> dict[str, Measured]:
        return {task: Measured(of.value, of.loss) for task, of in score(scoring()).items()}

    scorers: dict[str, Callable[[], Mapping[str, Measured]]] = {}
    if data:
        if job.base is not None:
            scorers["base"] = lambda: measured(lambda s: s.base())
        scorers |= {name: partial(measured, output.score) for name, output in outputs.items()}
        scorers["experts"] = lambda: measured(lambda s: s.experts())
    names = {name: Path(name) for name in outputs}
    return Bench(job, load, state, data, split, names, scorers)
