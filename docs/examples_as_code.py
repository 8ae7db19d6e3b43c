"""For the API pages: what stands under `Example:` in a docstring is code and is shown as code."""

from __future__ import annotations

import re
from textwrap import indent
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:\n((?: {4}.*(?:\n|$)|\n)+)", re.MULTILINE)


class ExamplesAsCode(griffe.Extension):
    """Puts the lines of the section into a fenced block, unless they are a `>>>` dialogue, which is known as it is."""

    def on_object(self, *, obj: griffe.Object, **others: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(section: re.Match[str]) -> str:
    code = "\n".join(line[4:] for line in section.group(1).rstrip().splitlines())
    block = code if code.startswith(">>>") else f"```python\n{code}\n```"
    return f"Examples:\n{indent(block, '    ')}\n"
