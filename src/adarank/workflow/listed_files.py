"""The files of a search or an analysis: what it made, the record that lists them, and the state beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adarank.errors import OutputError, itemise
from adarank.io.output_folder import check_ours, is_as_listed, read_list, sha256
from adarank.io.writer import json_text, write_bytes, write_json

_JOURNAL = "replacing.json"


@dataclass(frozen=True)
class ListedFiles:
    """What a command writes: files, and the record that lists them.

    The files are replaced one after the other. What they may replace is noted in the state first, so that the same
    command completes what a kill between them left.

    Attributes:
        made: the files beside the record.
        state: the folder that an interrupted run goes on from.
        command: what writes them, such as `search`.
        run: what errors call a run of it, such as `a search`.
    """

    made: tuple[Path, ...]
    record: Path
    state: Path
    command: str
    run: str

    def check(self, force: bool) -> None:
        """Refuse to overwrite what is there, before any work is done.

        Raises:
            OutputError: something is, and `force` is not given; or the command did not write it as it is; or what is
                kept of an interrupted run is not adarank's.
        """
        check_ours(self.state)
        there = [file for file in (*self.made, self.record) if os.path.lexists(file) and not self._begun(file)]
        if there and not force:
            names = ", ".join(map(str, there))
            raise OutputError(f"{names}: already exists. Give another name, or --force to replace it.")
        listed = read_list(self.record) or {}
        changed = [
            f"{file}: is not as {self.run} wrote it"
            for file in there
            if not (listed if file == self.record else is_as_listed(file, listed.get(file.name, {})))
        ]
        if changed:
            remedy = "Move it, or give another name."
            raise OutputError(itemise(f"--force replaces only what adarank {self.command} wrote:", changed, remedy))

    def write(self, contents: Mapping[Path, bytes], record: dict[str, Any]) -> None:
        """Write the files, and before them the record, which lists them."""
        record["files"] = {file.name: {"bytes": len(new), "sha256": sha256(new)} for file, new in contents.items()}
        every = {self.record: json_text(record).encode("utf-8", errors="backslashreplace"), **contents}
        known = {
            file.name: [sha256(new), *([sha256(file.read_bytes())] if file.exists() else [])]
            for file, new in every.items()
        }
        write_json(self.state / _JOURNAL, known)
        for file, new in every.items():
            write_bytes(file, new, self.state)

    def _begun(self, file: Path) -> bool:
        """True for a file that an interrupted run was about to replace, or had written."""
        journal = self.state / _JOURNAL
        if not journal.is_file() or not file.is_file():
            return False
        known = json.loads(journal.read_text(encoding="utf-8"))
        return sha256(file.read_bytes()) in known.get(file.name, ())
