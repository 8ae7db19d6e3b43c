"""The sections of an output's page, as plain data for the template. What a record lacks is a sentence in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import yaml

from adarank.report.figures import Chart, radar
from adarank.report.masks import coefficients, maps
from adarank.report.read import Output
from adarank.report.scores import agreement_table, judged_kept, kept_in_words, steps_kept
from adarank.report.spectra import NONE, described, overlap, ranks
from adarank.report.summary import duration, learned_heads, loop_block, sentences, size

_WEIGHTS = (".safetensors", ".bin", ".safetensors.index.json")
_BLOCKS = ("adaptation", "training", "statistics", "learned_heads", "bundle", "extracted")


def sections(output: Output) -> dict[str, Any]:
    """What the template shows of one output."""
    parts: dict[str, Callable[[Output], Any]] = {
        "facts": _facts,
        "agreement": _agreement,
        "steps": _steps,
        "coefficients": _coefficients,
        "maps": _maps,
        "spectra": _spectra,
        "overlap": _overlap,
        "heads": _heads,
        "warnings": _warnings,
        "tensors": _tensors,
        "files": _files,
        "cost": _cost,
        "recipe": _recipe,
        "inputs": _inputs,
    }
    return {
        "name": output.name,
        "method": _method(output.record),
        "summary": sentences(output),
        "tasks": list(output.masks.tasks) if output.masks else [],
        **{name: _built(build, output) for name, build in parts.items()},
    }


def _built(build: Callable[[Output], Any], output: Output) -> dict[str, Any]:
    """`content`, or where there is none `lacking`: a sentence that says why."""
    try:
        content = build(output)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        key = f" ({error})" if isinstance(error, KeyError) else ""
        why = "the merge has not ended" if not output.record else "an older version wrote it, or it is not whole"
        return {"content": None, "lacking": f"The record does not hold what is shown here{key}: {why}."}
    if isinstance(content, str):
        return {"content": None, "lacking": content}
    return {"content": content, "lacking": ""}


def _method(record: Mapping[str, Any]) -> str:
    for block, key in (("plan", "merge_method"), ("extracted", "kind")):
        value = record.get(block)
        if isinstance(value, Mapping) and isinstance(value.get(key), str):
            return str(value[key])
    return "not recorded"


def _facts(output: Output) -> dict[str, str]:
    record, plan = output.record, output.record["plan"]
    block = loop_block(record) or record.get("statistics") or {}
    values = {
        "method": plan["merge_method"],
        "kind of models": plan["kind"] or "not told by the recipe",
        "tasks": str(len(plan["tasks"])),
        "what the method read": plan["reads"] or "no labels",
        "protocol": block.get("protocol", ""),
        "seed": str(record["seed"]),
        "begun": record["begun"],
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }
    return {name: value for name, value in values.items() if value}


def _agreement(output: Output) -> Any:
    block = loop_block(output.record)
    if block is None:
        return "The method was not judged beside the experts: it ran no loop on unlabelled inputs."
    rows = agreement_table(block)
    series = {
        words: [row[key]["value"] for row in rows] for words, key in (("at the start", "start"), ("as kept", "kept"))
    }
    drawn = radar("Agreement with the experts, %.", [row["task"] for row in rows], series)
    return {"rows": rows, "why": block["why_kept"], "way_back": len(block["way_back"]), "radar": drawn}


def _steps(output: Output) -> Any:
    """Charts: the mean agreement, then each task's agreement and loss."""
    block = loop_block(output.record)
    if block is None:
        return "The method took no steps."
    judged = {int(step): seen for step, seen in block["judged"].items()}
    kept = judged_kept(block)
    at = {
        task: step * (block["share_kept"] or 1) for task, step in steps_kept(block).items()
    }  # on the line to the start
    means = [100 * sum(of["agreement"] for of in seen.values()) / len(seen) for seen in judged.values()]
    mean_kept = 100 * sum(of["agreement"] for of in kept.values()) / len(kept)
    text = f"Mean agreement with the experts: {means[0]:.1f}% at the start, {mean_kept:.1f}% as kept ({kept_in_words(block)})."
    common = next(iter(at.values())) if len(set(at.values())) == 1 else None
    mean = Chart(text, list(judged), means, "agreement", common)
    tasks = []
    for task in kept:
        values = [100 * seen[task]["agreement"] for seen in judged.values()]
        text = f"{task}: agreement with its expert {values[0]:.1f}% at the start, {100 * kept[task]['agreement']:.1f}% as kept."
        charts = [Chart(text, list(judged), values, "agreement", at[task]).view()]
        losses = block["losses"].get(task, [])
        if losses:
            text = f"{task}: loss {losses[0]:.3g} at the first step, {losses[-1]:.3g} at the last."
            charts.append(Chart(text, range(1, len(losses) + 1), losses, "loss", at[task]).view())
        tasks.append({"task": task, "charts": charts})
    return {"mean": mean.view(), "tasks": tasks, "kept": kept_in_words(block)}


def _coefficients(output: Output) -> Any:
    if output.masks is None:
        return "There is no masks file: the method learns neither λ nor masks."
    return coefficients(output.masks)


def _maps(output: Output) -> Any:
    if output.masks is None or not output.masks.masks:
        return "There are no masks: no matrix was decomposed."
    return maps(output.masks)


def _spectra(output: Output) -> Any:
    spectra = described(output.record)
    return NONE if spectra is None else ranks(spectra)


def _overlap(output: Output) -> Any:
    spectra = described(output.record)
    return NONE if spectra is None else overlap(spectra)


def _heads(output: Output) -> Any:
    heads = learned_heads(output.record)
    if not heads:
        return "No heads were learned: each task has its expert's." if output.record["plan"]["heads"] else "There are no heads."  # fmt: skip
    return [
        {
            "task": task,
            "kept": bool(head["kept"]),
            "before": round(100 * head["agreement"][0], 1),
            "after": round(100 * head["agreement"][1], 1),
            "divergence": tuple(map(float, head["divergence"])),
            "pull": head["pull"],
            "inputs": head["inputs"],
        }
        for task, head in heads.items()
    ]


def _warnings(output: Output) -> Any:
    record = output.record
    lines = [*record["plan"]["notes"]]
    for name in _BLOCKS:
        lines += record.get(name, {}).get("notes", ())
    block = loop_block(record)
    if block is not None:
        lines += [f"{task}: collapsed, as nearly all its inputs get one class." for task in block["collapsed"]]
        lines += [f"The start was kept: {block['why_kept']}."] if block["rolled_back"] else []
    lines += [f"{name}: kept from the base though experts changed it by up to {100 * share:.1f}%." for name, share in record["kept_though_changed"].items() if share > 0.01]  # fmt: skip
    lines += [f"{name}: kept from the base, as its shape is another in {', '.join(of)}." for name, of in record["kept_though_of_other_shape"].items()]  # fmt: skip
    lines += [f"{member}: {name} was not used ({why})." for member, dropped in record["plan"]["dropped"].items() for name, why in dropped.items()]  # fmt: skip
    return lines or "None."


def _tensors(output: Output) -> Any:
    return [{"name": name, **entry} for name, entry in output.record["plan"]["tensors"].items()]


def _files(output: Output) -> Any:
    return [
        {
            "name": name,
            "bytes": size(entry["bytes"]),
            "sha256": entry.get("sha256", "not recorded"),
            "role": "weights" if name.endswith(_WEIGHTS) else "side file",
        }
        for name, entry in output.record["files"].items()
    ]


def _cost(output: Output) -> dict[str, str]:
    record = output.record
    block: Mapping[str, Any] = loop_block(record) or {}
    machine, bundle = record["machine"], record.get("bundle")
    values = {
        "time": duration(record["seconds"]),
        "of it in steps": duration(block["seconds_in_steps"]) if "seconds_in_steps" in block else "",
        "of it judging": duration(block["seconds_judging"]) if "seconds_judging" in block else "",
        "peak memory": size(record["peak_resident_bytes"]),
        "predicted peak memory": size(record["plan"]["peak_bytes"]),
        "output": size(record["plan"]["output_bytes"]),
        "bundle": f"{size(bundle['bundle'])}; the experts whole are {size(bundle['experts'])}" if bundle else "",
        "machine": ", ".join(f"{name} {value}" for name, value in machine.items()),
    }
    return {name: value for name, value in values.items() if value}


def _recipe(output: Output) -> dict[str, str]:
    record = output.record
    dumped = [yaml.safe_dump(record[key], sort_keys=False, allow_unicode=True) for key in ("recipe", "settings")]
    return dict(zip(("recipe", "settings"), dumped, strict=True))


def _inputs(output: Output) -> Any:
    inputs = output.record["inputs"]
    return [
        {"model": model, "name": name, "sha256": digest} for model, of in inputs.items() for name, digest in of.items()
    ]
