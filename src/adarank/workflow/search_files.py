"""The files of a search: the best recipe, its record, and the state beside them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank.errors import OutputError, itemise
from adarank.io.output_folder import check_ours, is_as_listed, read_list, sha256
from adarank.io.writer import json_text, write_json, write_text

_JOURNAL = "replacing.json"


@dataclass(frozen=True)
class Written:
    """What a search writes: the best recipe, its record, and the folder that an interrupted search goes on from.

    The two files are replaced one after the other. What they may replace is noted in the state first, so that the same
    command completes what a kill between them left.
    """

    best: Path
    record: Path
    state: Path

    def check(self, force: bool) -> None:
        """Refuse to overwrite what is there, before any work is done.

        Raises:
            OutputError: something is, and `force` is not given; or no search wrote it as it is; or what is kept of an
                interrupted search is not adarank's.
        """
        check_ours(self.state)
        there = [file for file in (self.best, self.record) if os.path.lexists(file) and not self._begun(file)]
        if there and not force:
            names = ", ".join(map(str, there))
            raise OutputError(f"{names}: already exists. Give another name, or --force to replace it.")
        listed = read_list(self.record) or {}
        changed = [
            f"{file}: is not as a search wrote it"
            for file in there
            if not (is_as_listed(file, listed.get(file.name, {})) if file == self.best else listed)
        ]
        if changed:
            remedy = "Move it, or give another name."
            raise OutputError(itemise("--force replaces only what adarank search wrote:", changed, remedy))

    def write(self, text: str, record: dict[str, Any]) -> None:
        """Write the best recipe, and the record, which lists it."""
        content = text.encode()
        record["files"] = {self.best.name: {"bytes": len(content), "sha256": sha256(content)}}
        texts = {self.record: json_text(record), self.best: text}
        known = {
            file.name: [sha256(new.encode()), *([sha256(file.read_bytes())] if file.exists() else [])]
            for file, new in texts.items()
        }
        write_json(self.state / _JOURNAL, known)
        for file, new in texts.items():
            write_text(file, new, self.state)

    def _begun(self, file: Path) -> bool:
        """True for a file that an interrupted search was about to replace, or had written."""
        journal = self.state / _JOURNAL
        if not journal.is_file() or not file.is_file():
            return False
        known = json.loads(journal.read_text(encoding="utf-8"))
        return sha256(file.read_bytes()) in known.get(file.name, ())
