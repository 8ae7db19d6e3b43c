"""Is an output what was written, of what it says it is? Files are hashed again, and the merge is done again where it can be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.errors import AdaRankError, CheckpointError, listed
from adarank.io.adapter import WEIGHTS, is_adapter
from adarank.io.adapter_config import CONFIG
from adarank.io.cards import CARD
from adarank.io.files import file_sha256, read_json
from adarank.io.hub import local_path, resolve, split_adapter
from adarank.io.output_folder import RECORD, differences, read_list, record_problems
from adarank.io.record import Note, versions
from adarank.recipe.job import open_job
from adarank.recipe.reader import parse_recipe
from adarank.recipe.schema import Recipe
from adarank.spectral.mask_file import FILE as MASKS
from adarank.workflow.merge import merge

_OF_ADAPTER = (CONFIG, *WEIGHTS)
_LEARNED = ("adapt", "heads", "parameters")  # keys of a recipe that a masks file stands for


@dataclass(frozen=True)
class Verified:
    """What verifying an output came to.

    Attributes:
        problems: what is not as it was recorded, or cannot be known to be, in sentences that begin with the file's name.
        notes: what could not be compared, and why, in sentences.
        files, inputs: how many files of the output and of its inputs were hashed.
        remade: files that merging again gave byte for byte.
        not_remade: files that merging again does not give: the record and the card, which are of that very run, and what was learned.
            Empty where nothing was merged again.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    files: int = 0
    inputs: int = 0
    remade: tuple[str, ...] = ()
    not_remade: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Nothing differs from the record."""
        return not self.problems


@dataclass
class _Findings:
    """As `Verified`, while it is being collected."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    inputs: int = 0
    remade: list[str] = field(default_factory=list)


def verify(out: str | Path, folder: str | Path | None = None, note: Note = lambda text: None) -> Verified:
    """Compare an output with its record: its files, its inputs, and what merging again gives.

    Arguments:
        out: a folder that `merge` or `extract` wrote.
        folder: where the recipe's paths count from; what is not there is a problem then. By default the working
            folder or the output's parent, and inputs that lie in neither are left out, with a note.
        note: called with a line of text as each stage begins.

    Returns:
        The problems, what could not be compared, and how much was (`ok` is True if there is no problem). An adapted
        model is merged again by its masks file, one of a method without data by its recipe, one of a method with
        statistics by its recipe if its data are there. What was trained is not made again.

    Raises:
        CheckpointError: it has no record.

    Example:
        verified = adarank.verify("merged")
        print(verified.ok, verified.problems, verified.remade)
    """
    out = local_path(out)
    if not (out / RECORD).is_file():
        raise CheckpointError(
            f"{out}: no {RECORD}, so there is nothing to compare with. Give a folder that adarank wrote."
        )
    note("Hashing the output")
    problems, files = record_problems(out), read_list(out / RECORD)
    if files is None:
        return Verified(tuple(problems) or (f"{RECORD}: lists no files of the output, so none can be checked",))
    record = read_json(out / RECORD)
    findings = _Findings([*problems, *differences(out, files, whole=True)])
    if findings.problems:
        findings.notes.append("Not merged again, as the output's files differ from its record.")
    elif "stages" in record:
        findings.notes.append("Inputs were not hashed, nor merged again: what the stages gave was not kept.")
    elif "recipe" not in record:
        findings.notes.append("Inputs were not hashed: the record names no recipe.")
    else:
        _inputs_and_merge(findings, out, record, None if folder is None else Path(folder), note)
    remade = tuple(findings.remade)
    others = tuple(name for name in (*files, RECORD) if name not in remade) if remade else ()
    return Verified(tuple(findings.problems), tuple(findings.notes), len(files) + 1, findings.inputs, remade, others)


def _inputs_and_merge(
    findings: _Findings, out: Path, record: Mapping[str, Any], folder: Path | None, note: Note
) -> None:
    note("Hashing the inputs")
    recipe, inputs = _inputs(record, [folder] if folder else [Path.cwd(), out.resolve().parent])
    if recipe is None:
        where = folder or "the working folder or the output's parent"
        text = f"inputs: not there, as the recipe's paths count from {where}"
        if folder:
            findings.problems.append(text)
        else:
            findings.notes.append(f"{text}. Nothing of them was compared; give the recipe's folder (--from).")
        return
    findings.inputs = len(inputs)
    for name, (path, digest) in inputs.items():
        if not path.is_file():
            findings.problems.append(f"{name}: is missing ({path})")
        elif file_sha256(path) != digest:
            findings.problems.append(f"{name}: has changed since the merge ({path})")
    if findings.problems:
        findings.notes.append("Not merged again, as the inputs differ from the record.")
    else:
        _merge_again(findings, out, record, recipe, note)


def _inputs(record: Mapping[str, Any], folders: list[Path]) -> tuple[Recipe | None, dict[str, tuple[Path, str]]]:
    """The recipe, read from the first folder in which an input lies; and name -> (file, the hash that the record has)."""
    for folder in folders:
        try:
            recipe = parse_recipe(record["recipe"], folder, RECORD)
            inputs = dict(_input_files(record, recipe))
        except AdaRankError:  # such as a masks file that is not there
            continue
        if any(path.exists() for path, _ in inputs.values()):
            return recipe, inputs
    return None, {}


def _input_files(record: Mapping[str, Any], recipe: Recipe) -> Iterator[tuple[str, tuple[Path, str]]]:
    references = {task: entry.model for task, entry in recipe.experts.items()}
    if recipe.base_model:
        references["base"] = recipe.base_model
    for label, files in record["inputs"].items():
        model, adapter = _places(references[label], recipe)
        for name, digest in files.items():
            folder = adapter if adapter is not None and name in _OF_ADAPTER else model
            yield f"input {label}: {name}", (folder / name, digest)


def _places(reference: str, recipe: Recipe) -> tuple[Path, Path | None]:
    """The folder of a model, and that of its adapter: one without a model of its own is the base's."""
    model, adapter = split_adapter(reference, recipe.folder)
    over = None if adapter is None else resolve(adapter, recipe.folder, True)
    place = resolve(model, recipe.folder)
    if over is None and is_adapter(place) and recipe.base_model is not None:
        place, over = resolve(recipe.base_model, recipe.folder), place
    return place if place.is_dir() else place.parent, over


def _merge_again(findings: _Findings, out: Path, record: Mapping[str, Any], recipe: Recipe, note: Note) -> None:
    """Merge into a temporary folder, and compare all files that say the same as the output's."""
    changed, why_not = _recipe_again(out, record, recipe)
    if changed is None:
        findings.notes.append(f"Not merged again: {why_not}.")
        return
    note("Merging again")
    with tempfile.TemporaryDirectory(prefix="adarank-verify-") as scratch:
        again = Path(scratch).resolve() / "out"
        try:
            made = merge(changed, again)
        except AdaRankError as error:
            findings.notes.append(f"Not merged again: {' '.join(listed(error))}")
            return
        same = [name for name in made["files"] if name != CARD]  # which is of this very recipe and its scores
        other = [name for name in same if made["files"][name]["sha256"] != _sha256(out / name)]
    kept = [task for task, head in _heads(record).items() if head.get("kept")]
    learned = [f"heads/{task}/" for task in (*kept, *record.get("adaptation", {}).get("joint_heads", ()))]
    other = [name for name in other if not name.startswith(tuple(learned))]
    findings.remade += [name for name in same if name not in other and not name.startswith(tuple(learned))]
    if learned:
        findings.notes.append(f"Not made again: {len(learned)} heads that were learned on the tasks' inputs.")
    findings.problems += [f"{name}: merging again gives other bytes{_elsewhere(record)}" for name in other]


def _recipe_again(out: Path, record: Mapping[str, Any], recipe: Recipe) -> tuple[Recipe | None, str]:
    """The recipe that makes the output again without learning; or None, and what it would need."""
    values = {key: value for key, value in record["recipe"].items() if key not in ("heads", "report_to")}
    if (out / MASKS).exists() and "bundle" not in record:
        values = {key: value for key, value in values.items() if key not in _LEARNED}
        models = [{key: value for key, value in entry.items() if key != "parameters"} for entry in values["models"]]
        masked = {"merge_method": "masked", "parameters": {"masks": str((out / MASKS).resolve())}, "models": models}
        return parse_recipe({**values, **masked}, recipe.folder), ""
    try:
        method = open_job(recipe).method
    except AdaRankError as error:
        return None, " ".join(listed(error))
    if method.data and "statistics" not in record:
        return None, f"'{method.name}' learns on the tasks' data, and no masks file keeps what it learned"
    return parse_recipe(values, recipe.folder), ""


def _heads(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Task -> what learning its head gave."""
    for block in ("learned_heads", "adaptation"):
        heads: Mapping[str, Any] = record.get(block, {}).get("heads", {})
        if heads:
            return heads
    return {}


def _sha256(file: Path) -> str:
    return file_sha256(file) if file.is_file() else ""


def _elsewhere(record: Mapping[str, Any]) -> str:
    """How the versions differ from those that the output was made with, in words."""
    now = versions()
    other = [
        f"{name} {then}, here {now.get(name)}" for name, then in record["versions"].items() if now.get(name) != then
    ]
    return f" (it was made with {'; '.join(other)})" if other else ""
