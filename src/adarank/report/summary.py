"""What a record says, in sentences: every number in them is the record's, or counted from the masks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adarank.report.masks import kept_by_task
from adarank.report.read import Output
from adarank.report.scores import agreement_table, interval, kept_in_words
from adarank.report.spectra import described, in_words
from adarank.spectral.bases import COMMON

_UNSEEN = 0.00005  # nats, which four decimals do not show


def sentences(output: Output) -> list[str]:
    """The summary of one output; as much of it as its record holds."""
    parts = (_merged, _agreement, _masks, _spectra, _heads, _cost)
    lines: list[str] = [output.note] if output.note else []
    for part in parts:
        try:
            lines += part(output)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):  # a record that has less, or other things
            continue
    return lines


def loop_block(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the record says of a loop with a judge, if one ran."""
    blocks = (record.get(name) for name in ("adaptation", "training"))
    return next((block for block in blocks if isinstance(block, Mapping) and "judged" in block), None)


def learned_heads(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Task -> what learning its head gave."""
    blocks = [record.get(name) or {} for name in ("learned_heads", "adaptation")]
    heads: Mapping[str, Any] = next((block["heads"] for block in blocks if block.get("heads")), {})
    return heads


def _merged(output: Output) -> Iterator[str]:
    plan, record = output.record["plan"], output.record
    tasks, method = plan["tasks"], plan["merge_method"]
    into = "a bundle with a network for each task" if "bundle" in record else "one model"
    yield f"{len(tasks)} models were merged into {into} by {method}: {', '.join(tasks)}."


def _agreement(output: Output) -> Iterator[str]:
    block = loop_block(output.record)
    if block is None:
        return
    rows = agreement_table(block)
    before, after = (sum(row[name]["value"] for row in rows) / len(rows) for name in ("start", "kept"))
    if block["rolled_back"]:
        yield f"The start was kept, as no judged step of {block['steps']} was better: mean agreement with the experts {before:.1f}%."
    else:
        yield (
            f"Mean agreement with the experts went from {before:.1f}% at the start to {after:.1f}% as kept: "
            f"{kept_in_words(block)}."
        )
        gains = {row["task"]: row["kept"]["value"] - row["start"]["value"] for row in rows}
        most, least = max(gains, key=lambda t: gains[t]), min(gains, key=lambda t: gains[t])
        if most != least:
            yield f"{most} changed by {gains[most]:+.1f} points, the most, and {least} by {gains[least]:+.1f}, the least."
    fewest = min(rows, key=lambda row: row["inputs"])
    low, high = interval(fewest["kept"]["value"] / 100, fewest["inputs"])
    yield (
        f"A task's agreement rests on {fewest['inputs']} inputs or more, without labels: "
        f"{fewest['kept']['value']:.1f}% of {fewest['inputs']} is {100 * low:.1f}% to {100 * high:.1f}% with 95% confidence."
    )
    if block["collapsed"]:
        yield f"Collapsed, as nearly all inputs get one class: {', '.join(block['collapsed'])}."


def _masks(output: Output) -> Iterator[str]:
    masks = output.masks
    if masks is None or not masks.masks:
        return
    total, kept = sum(mask.numel() for mask in masks.masks.values()), masks.kept_share()
    shares = kept_by_task(masks)
    most, least = max(shares, key=lambda t: shares[t]), min(shares, key=lambda t: shares[t])
    ends = (
        f"{100 * shares[most]:.1f}% of {_whose(most)}, the most, and {100 * shares[least]:.1f}% of {_whose(least)}, the least"
        if shares[most] > shares[least]
        else "as many of each task"
    )
    yield f"Of {total:,} singular components in {len(masks.masks)} matrices {100 * kept:.1f}% are kept: {ends}."
    strongest = masks.least_kept()
    if strongest is not None and strongest[2] < 1:
        name, task, value = strongest
        lam = float(masks.lam[name][masks.tasks.index(task)])
        done = "left out" if value == 0 else f"multiplied by {value:.2f}"
        yield f"The strongest direction of {_whose(task)} in {name} is {done}, with λ {lam:.2f}: no other strongest direction has less."
        yield from _effect(output.record, name, task)


def _effect(record: Mapping[str, Any], name: str, task: str) -> Iterator[str]:
    """Whom it harmed and helped that this direction is kept less, as the record has it."""
    effect = (record.get("adaptation") or {}).get("strongest_change")
    if not effect or (effect["tensor"], effect["task"]) != (name, task):
        return
    changes = {each: of["kept"] - of["whole"] for each, of in effect["divergence"].items()}
    most, least = max(changes, key=lambda t: changes[t]), min(changes, key=lambda t: changes[t])
    raised = f"raised {most}'s divergence from its expert the most, by {changes[most]:.4f} nats"
    lowered = f"lowered {least}'s divergence from its expert the most, by {-changes[least]:.4f} nats"
    parts = [text for text, seen in ((raised, changes[most] > _UNSEEN), (lowered, changes[least] < -_UNSEEN)) if seen]
    did = ", and ".join(parts) or "changed no task's divergence from its expert by 0.0001 nats"
    yield f"That {did}: measured by putting it back whole."


def _spectra(output: Output) -> list[str]:
    spectra = described(output.record)
    return [] if spectra is None else in_words(spectra)


def _whose(task: str) -> str:
    return "what all tasks share" if task == COMMON else task


def _heads(output: Output) -> Iterator[str]:
    heads = learned_heads(output.record)
    if heads:
        kept = [task for task, head in heads.items() if head["kept"]]
        which = f": {', '.join(kept)}" if kept else ""
        others = "" if len(kept) == len(heads) else "; the others stay the experts'"
        yield f"Of {len(heads)} heads that were learned {len(kept)} are kept{which}{others}."


def _cost(output: Output) -> Iterator[str]:
    record = output.record
    text = f"It took {duration(record['seconds'])} and at most {size(record['peak_resident_bytes'])} of memory"
    written, experts = record["plan"]["output_bytes"], record["plan"]["experts_bytes"]
    share = f", {100 * written / experts:.1f}% of the experts' {size(experts)}" if experts else ""
    yield f"{text}; the output's weights take {size(written)}{share}."


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
