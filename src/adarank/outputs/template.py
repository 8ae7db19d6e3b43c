"""The chat template in an output: one file beside the tokenizer's, and nothing of another one."""

from __future__ import annotations

from pathlib import Path

from adarank.io.files import read_json
from adarank.io.writer import write_json, write_text
from adarank.recipe.chat_templates import CONFIG, FILE, KEY, ChatTemplate

_OLDER = "chat_template.json"  # of processors


def write_template(folder: Path, template: ChatTemplate | None) -> None:
    """Write a template where `transformers` looks first, and take away what else is there of templates."""
    if template is None or template.text is None:
        return
    (folder / FILE).unlink(missing_ok=True)  # not written through: a copy may be read-only
    (folder / _OLDER).unlink(missing_ok=True)
    write_text(folder / FILE, template.text)
    settings = read_json(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if KEY in settings:
        write_json(folder / CONFIG, {key: value for key, value in settings.items() if key != KEY})
