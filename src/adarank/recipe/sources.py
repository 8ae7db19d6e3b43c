"""Where the models of a merge come from, and what may be done with them: ids on the hub, licences that their cards state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adarank.errors import CheckpointError
from adarank.io.cards import stated_license
from adarank.io.checkpoint import Checkpoint
from adarank.io.files import read_json
from adarank.io.hub import repository
from adarank.io.output_folder import RECORD
from adarank.recipe.job import Job

Sources = Mapping[str, Mapping[str, list[str]]]
"""Model (`base`, or its task) -> `hub`: ids of the repositories that it is made of; `licenses`: those that cards state."""


def sources_of(job: Job) -> dict[str, dict[str, list[str]]]:
    """The sources of every model that is merged. An output of adarank has the sources of what it was merged from."""
    members = {**({"base": job.base} if job.base else {}), **job.experts}
    return {name: _source(checkpoint) for name, checkpoint in members.items()}


def _source(checkpoint: Checkpoint) -> dict[str, list[str]]:
    hub: dict[str, None] = {}
    licenses: dict[str, None] = {}
    for folder in dict.fromkeys(file.parent for file in checkpoint.files):
        merged = recorded_sources(_record(folder))
        for source in merged.values():
            hub |= dict.fromkeys(source["hub"])
            licenses |= dict.fromkeys(source["licenses"])
        on_hub = repository(folder)
        if on_hub is not None and not merged:
            hub[on_hub[0]] = None
        places = (folder, on_hub[1]) if on_hub else (folder,)
        stated = next((text for place in places if (text := stated_license(place))), None)
        if stated is not None:
            licenses[stated] = None
    return {"hub": list(hub), "licenses": list(licenses)}


def _record(folder: Path) -> Mapping[str, Any]:
    """The record of an output of adarank; nothing of another folder, or of a record that is damaged."""
    try:
        record: dict[str, Any] = read_json(folder / RECORD)
    except CheckpointError:
        return {}
    return record


def recorded_sources(record: Mapping[str, Any]) -> dict[str, dict[str, list[str]]]:
    """The sources that a record has, of a merge or of one task of it; none if an older version wrote it."""
    blocks = [block for key in ("plan", "extracted") if isinstance(block := record.get(key), dict)]
    sources: Mapping[str, Any] = next(
        (block["sources"] for block in blocks if isinstance(block.get("sources"), dict)), {}
    )
    return {
        name: {key: [text for text in source.get(key, ()) if isinstance(text, str)] for key in ("hub", "licenses")}
        for name, source in sources.items()
        if isinstance(source, dict)
    }


def common_license(sources: Sources) -> str | None:
    """The one licence that is stated, by one or more; None if there is none, or if they are several."""
    stated = {text for source in sources.values() for text in source["licenses"]}
    return stated.pop() if len(stated) == 1 else None


def license_notes(sources: Sources) -> list[str]:
    """A sentence where the models' cards state different licences."""
    stated = {text for source in sources.values() for text in source["licenses"]}
    if len(stated) < 2:
        return []
    of_each = "; ".join(f"{name} {', '.join(source['licenses']) or 'none'}" for name, source in sources.items())
    return [
        f"The models' cards state different licences ({of_each}), so the merge's card states none. Settle which may be used "
        "before you publish it."
    ]
