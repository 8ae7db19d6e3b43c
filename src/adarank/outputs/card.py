"""The model card of an output (README.md), made from its record: YAML for the hub, and for people what it is and how it loads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from adarank.data.metrics import LOSS
from adarank.errors import AdaRankError
from adarank.io.adapter_config import CONFIG as ADAPTER_CONFIG
from adarank.io.cards import CARD, Measured, front_matter
from adarank.io.files import read_json
from adarank.io.sentence import MODULES
from adarank.io.writer import write_text
from adarank.outputs.write import CONFIG
from adarank.recipe.catalogue import entry
from adarank.recipe.registry import METHODS
from adarank.recipe.sources import common_license, license_notes, recorded_sources

_FOLDER = "path/to/this/folder"
_LOAD = f'folder = "{_FOLDER}"  # or huggingface_hub.snapshot_download("org/name")'
# metric -> what the hub calls it (https://huggingface.co/metrics)
_ON_HUB = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_AUTO = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}  # peft's task types


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the card of an output that is being written, from what its record will hold."""
    write_text(folder / CARD, card(record, folder))


def card(record: Mapping[str, Any], folder: Path) -> str:
    """The card's text.

    Arguments:
        record: the output's. `scores`, if it has them, are its name, split, protocol, and of each task metric, score, the
            expert's score or None, and number of inputs.
        folder: where the output's other files are: they tell what loads them.
    """
    sources = recorded_sources(record)
    scores = record.get("scores") or {}
    head = front_matter(
        list(dict.fromkeys(name for source in sources.values() for name in source["hub"])),
        ["merge", "adarank"],
        _library(record, folder),
        common_license(sources),
        scores.get("name", ""),
        [_measured(task, of, scores["split"], _kind(record)) for task, of in scores.get("tasks", {}).items()],
    )
    parts = [_title, _use, _scores, _method, _inputs, _notes, _recipe]
    blocks = ["\n".join(lines) for part in parts if (lines := list(part(record, folder)))]
    return head + "\n" + "\n\n".join(blocks) + "\n"


def _plan(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Method, tasks and kind of models, of a merge or of one task of one."""
    extracted = record.get("extracted")
    if extracted:
        return {"merge_method": extracted["method"], "tasks": [extracted["task"]], "kind": extracted["models"]}
    plan: Mapping[str, Any] = record["plan"]
    return plan


def _kind(record: Mapping[str, Any]) -> str:
    return str(_plan(record)["kind"] or "other")


def _library(record: Mapping[str, Any], folder: Path) -> str:
    if "bundle" in record or "lora" in record:
        return "adarank" if "bundle" in record else "peft"
    return "sentence-transformers" if (folder / MODULES).exists() else "transformers"


def _title(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    plan = _plan(record)
    tasks, method = plan["tasks"], plan["merge_method"]
    if "extracted" in record:
        yield f"# {_text(tasks[0])}, of a merge by {method}"
        yield ""
        yield f"One task of a model that adarank merged by `{method}`, as an ordinary folder of transformers."
        return
    into = "a bundle with weights for each" if "bundle" in record else "one"
    count = f"{len(tasks)} model{'s' if len(tasks) != 1 else ''}"
    yield f"# {count} merged by {method}"
    yield ""
    yield f"adarank merged {count} into {into} by `{method}`: {', '.join(_code(task) for task in tasks)}."


def _use(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    plan = _plan(record)
    tasks = [task for task, names in plan.get("heads", {}).items() if names]
    yield "## How to load it"
    yield ""
    if "lora" in record:
        yield from _use_adapter(record, folder, tasks)
    elif "bundle" in record:
        yield METHODS[plan["merge_method"]].in_use
        yield from (
            _use_tasks(plan["tasks"])
            if plan["kind"]
            else _python(
                "import adarank",
                _LOAD,
                *(f"weights = dict(adarank.Bundle(folder).tensors({task!r}))" for task in plan["tasks"]),
            )
        )
    elif tasks and plan["kind"]:
        yield "Each task has a network with its head:"
        yield from _use_tasks(tasks)
    elif _library(record, folder) == "sentence-transformers":
        yield from _python(
            "import sentence_transformers", _LOAD, "model = sentence_transformers.SentenceTransformer(folder)"
        )
    else:
        classes = read_json(folder / CONFIG).get("architectures")
        name = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else "AutoModel"
        yield from _python("import transformers", _LOAD, f"model = transformers.{name}.from_pretrained(folder)")


def _use_tasks(tasks: Sequence[str]) -> Iterator[str]:
    loads = (f"{_variable(i)} = adarank.load_task(folder, {task!r})" for i, task in enumerate(tasks))
    yield from _python("import adarank", _LOAD, *loads)
    yield f"`adarank extract {_FOLDER} TASK FOLDER` writes one task as an ordinary folder of transformers."


def _use_adapter(record: Mapping[str, Any], folder: Path, tasks: Sequence[str]) -> Iterator[str]:
    kind = _AUTO.get(read_json(folder / ADAPTER_CONFIG).get("task_type"), "AutoModel")
    base = next(iter(recorded_sources(record).get("base", {}).get("hub", [])), "path/to/the/base")
    yield "A LoRA adapter of the base."
    yield from _python(
        "import peft",
        "import transformers",
        _LOAD,
        f"base = transformers.{kind}.from_pretrained({base!r})",
        "model = peft.PeftModel.from_pretrained(base, folder)",
    )
    if tasks:
        yield f"The tasks' heads lie in `heads/TASK`: {', '.join(map(_code, tasks))}."


def _python(*lines: str) -> Iterator[str]:
    yield from ("", "```python", *lines, "```", "")


def _variable(number: int) -> str:
    return "model" if number == 0 else f"model_{number + 1}"


def _scores(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    scores = record.get("scores")
    if not scores:
        return
    yield "## Scores"
    yield ""
    yield f"On the {scores['split']} split, {scores['protocol']} protocol, by `adarank evaluate`; per cent, but for losses."
    yield ""
    experts = any(of["expert"] is not None for of in scores["tasks"].values())
    yield "| task | metric | inputs | score |" + (" its expert |" if experts else "")
    yield "|---|---|---:|---:|" + ("---:|" if experts else "")
    for task, of in scores["tasks"].items():
        last = f" {_number(of['expert'], of['metric'])} |" if experts else ""
        yield f"| {_text(task)} | {of['metric']} | {of['inputs']} | {_number(of['score'], of['metric'])} |{last}"


def _number(value: float | None, metric: str) -> str:
    return "" if value is None else f"{value:.3f}" if metric == LOSS else f"{value:.1f}"


def _measured(task: str, of: Mapping[str, Any], split: str, kind: str) -> Measured:
    metric, value = of["metric"], of["score"]
    share = value if metric == LOSS else round(value / 100, 6)
    return Measured(kind, task, split, _ON_HUB.get(metric, metric), metric.replace("_", " "), share)


def _method(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    name = _plan(record)["merge_method"]
    try:
        about = entry(name)
    except AdaRankError:  # of a package that is not installed here
        return
    yield "## Method"
    yield ""
    yield f"`{name}`: {about.summary} Source: {about.source}."
    yield ""
    yield f"    {about.formula}"


def _inputs(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    hashes, sources = record.get("inputs", {}), recorded_sources(record)
    if not hashes and not sources:
        return
    yield "## Inputs"
    yield ""
    yield "| model | on the hub | licence of its card | file | SHA-256 |"
    yield "|---|---|---|---|---|"
    for name in dict.fromkeys([*sources, *hashes]):
        of = sources.get(name, {"hub": [], "licenses": []})
        lead = [_text(name), ", ".join(of["hub"]), ", ".join(of["licenses"]) or "not stated"]
        for file, digest in hashes.get(name, {"": ""}).items():
            yield f"| {' | '.join([*map(_text, lead), _text(file), _code(digest)])} |"
            lead = ["", "", ""]


def _notes(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    notes = [*(record.get("notes") or ()), *_plan(record).get("notes", ())]
    if "extracted" in record:
        notes += license_notes(recorded_sources(record))
    if notes:
        yield "## Notes"
        yield ""
        yield from (f"- {_text(note)}" for note in notes)


def _recipe(record: Mapping[str, Any], folder: Path) -> Iterator[str]:
    yield "## Recipe"
    yield ""
    if "recipe" in record:
        yield "```yaml"
        yield yaml.safe_dump(record["recipe"], sort_keys=False, allow_unicode=True).rstrip()
        yield "```"
        yield ""
    yield "`adarank.json` has every setting, versions, and the SHA-256 of each file; `adarank verify` compares them."


def _text(text: str) -> str:
    """Text that Markdown shows as it is, in one line of a table."""
    for special in "\\`*_<|[]":
        text = text.replace(special, f"\\{special}")
    return " ".join(text.split())


def _code(text: str) -> str:
    return f"`{text}`" if text and "`" not in text and "|" not in text else _text(text)
