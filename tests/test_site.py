"""The documentation as a site: what it shows of the API is whole, and its examples run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adarank

DOCS = Path(__file__).resolve().parent.parent / "docs"
GUIDES = [DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PAGES = [DOCS / "index.md", *sorted((DOCS / "api").glob("*.md"))]
EXAMPLES = [
    (page.relative_to(DOCS).as_posix(), code)
    for page in PAGES
    for code in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]


@pytest.mark.parametrize("name", adarank.__all__)
def test_every_public_name_is_on_one_api_page(name: str) -> None:
    shown = [
        path for page in PAGES for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    places = {f"adarank.{name}", f"adarank.api.{name}"}
    if getattr(adarank, name).__module__ == "adarank.errors":
        places.add("adarank.errors")
    assert len([path for path in shown if path in places]) == 1


def test_the_errors_page_has_every_error() -> None:
    listed = re.search(r"members: \[(.*)\]", (DOCS / "api" / "errors.md").read_text(encoding="utf-8"))
    assert listed
    things = vars(adarank.errors).items()
    errors = {name for name, thing in things if isinstance(thing, type) and issubclass(thing, Exception)}
    assert set(listed.group(1).split(", ")) == errors


PRIVATE_WORDS = (
    r"\bhangs? on\b|\bway back\b|\bstarts all but\b|\bd(?:id|oes) not do\b|\bby the back door\b|\breckon"
    r"|\bglance\b|\bcompanions?\b|\bask(?:s|ed|ing)? (?:the experts|them)\b|\bis told\b|\bunasked\b"
)


@pytest.mark.parametrize("page", GUIDES, ids=[page.name for page in GUIDES])
def test_guides_use_the_fields_words(page: Path) -> None:
    assert not re.findall(PRIVATE_WORDS + r"|\bis none\b", page.read_text(encoding="utf-8"))


def test_comments_and_errors_use_the_fields_words() -> None:
    for path in sorted((DOCS.parent / "src").rglob("*.py")):
        assert not re.findall(PRIVATE_WORDS, path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize(("page", "code"), EXAMPLES, ids=[page for page, _ in EXAMPLES])
def test_examples_of_the_api_pages_run(page: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})
