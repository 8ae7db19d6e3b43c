"""Four kinds of text for lm-4, read or made, and held out by play, article, file or problem."""

from __future__ import annotations

import csv
import random
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import seed_for

DOMAINS = ("verse", "news", "code", "arithmetic")

# How the plays of the usual file begin; a file without them is cut into as many stretches.
PLAYS = (
    "Before we proceed any further, hear me speak.",
    "Now is the winter of our discontent",
    "Old John of Gaunt, time-honour'd Lancaster,",
    "Gregory, o' my word, we'll not carry coals.",
    "I wonder how the king escaped our hands.",
    "If you shall chance, Camillo, to visit Bohemia, on",
    "Escalus.\n\nESCALUS:\nMy lord.",
    "I'll pheeze you, in faith.",
    "Boatswain!",
)
NEWS_ROWS = 9000
CODE_BYTES = (2_000, 60_000)
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack")
THINGS = ("apples", "books", "coins", "eggs", "nails", "pens", "plums", "shells", "stamps", "tickets")


@dataclass(frozen=True)
class Document:
    """What is held out as a whole. A problem's answer follows its prompt; other documents are all prompt."""

    prompt: str
    answer: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return self.prompt + self.answer


Splits = dict[str, list[Document]]  # train, adapt, select, test


def held_out(documents: list[Document], shares: dict[str, float], seed: int, domain: str) -> Splits:
    """Shuffled documents dealt out by share of the characters; what no other split takes is train."""
    order = list(documents)
    random.Random(seed_for(seed, "split", domain)).shuffle(order)
    whole = sum(len(document.text) for document in order)
    splits: Splits = {}
    for split, share in shares.items():
        splits[split], taken = [], 0
        while taken < share * whole and len(order) > 1:
            splits[split].append(order.pop())
            taken += len(splits[split][-1].text)
    return {"train": order, **splits}


def verse(file: Path, seed: int) -> Splits:
    """Plays: one each for adapt, select and test, the others to train on."""
    text = file.read_text(encoding="utf-8")
    places = [text.find(opening) for opening in PLAYS]
    # a play begins at the blank line before the name of who speaks first
    starts = [max(0, text.rfind("\n\n", 0, place) + 2) if place > 99 else 0 for place in places]
    if min(places) < 0 or starts != sorted(set(starts)):
        blank = [place for place in range(len(text)) if text.startswith("\n\n", place)]
        starts = [0, *(blank[len(blank) * part // len(PLAYS)] + 2 for part in range(1, len(PLAYS)))]
    plays = [
        Document(text[a:b].strip() + "\n") for a, b in zip(starts, [*starts[1:], len(text)], strict=True)
    ]
    random.Random(seed_for(seed, "split", "verse")).shuffle(plays)
    return {"train": plays[3:], "adapt": plays[:1], "select": plays[1:2], "test": plays[2:3]}


def news(file: Path, seed: int) -> Splits:
    """The last column of a table with tabs, one article a row, without repeated ones."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        next(rows)
        articles = dict.fromkeys(row[-1].strip() for row, _ in zip(rows, range(NEWS_ROWS), strict=False))
    shares = {"adapt": 0.08, "select": 0.05, "test": 0.08}
    return held_out([Document(article + "\n") for article in articles if article], shares, seed, "news")


def code(folder: Path, seed: int) -> Splits:
    """Python files directly in a folder, as in the standard library's."""
    least, most = CODE_BYTES
    files = sorted(file for file in folder.glob("*.py") if least <= file.stat().st_size <= most)
    documents = [Document(file.read_text(encoding="utf-8")) for file in files]
    return held_out(documents, {"adapt": 0.08, "select": 0.06, "test": 0.08}, seed, "code")


def _total(a: int, b: int) -> str:
    """How two numbers below 100 are added, ones first."""
    ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    return f" {a % 10} + {b % 10} = {ones}, {a - a % 10} + {b - b % 10} = {tens}, {tens} + {ones} = {a + b}\n"


def sum_of_two(draw: random.Random) -> Document:
    """A sum with its steps."""
    a, b = draw.randint(10, 99), draw.randint(10, 99)
    return Document(f"Q: What is {a} + {b}?\nA:", _total(a, b))


def product(draw: random.Random) -> Document:
    """A product of a digit and a number of two digits, by its tens and ones."""
    a, b = draw.randint(2, 9), draw.randint(11, 99)
    tens, ones = a * (b - b % 10), a * (b % 10)
    return Document(
        f"Q: What is {a} * {b}?\nA:",
        f" {a} * {b - b % 10} = {tens}, {a} * {b % 10} = {ones}, {tens} + {ones} = {a * b}\n",
    )


def comparison(draw: random.Random) -> Document:
    """Which of two different numbers is larger, or smaller."""
    a, b = draw.sample(range(10, 999), 2)
    word, answer = draw.choice([("larger", max(a, b)), ("smaller", min(a, b))])
    return Document(f"Q: Which is {word}, {a} or {b}?\nA:", f" {answer}\n")


def story(draw: random.Random) -> Document:
    """Someone has things and gets more, or gives some away."""
    who, things, a, b = draw.choice(PEOPLE), draw.choice(THINGS), draw.randint(11, 49), draw.randint(2, 9)
    gets = draw.random() < 0.5
    does, left = (f"buys {b} more", a + b) if gets else (f"gives {b} away", a - b)
    return Document(
        f"Q: {who} has {a} {things} and {does}. How many {things} has {who} now?\nA:",
        f" {a} {'+' if gets else '-'} {b} = {left} {things}\n",
    )


KINDS: tuple[Callable[[random.Random], Document], ...] = (sum_of_two, product, comparison, story)


def arithmetic(counts: dict[str, int], seed: int) -> Splits:
    """Problems of four kinds; no problem is in two splits, nor twice in one that is not trained on."""
    draw = random.Random(seed_for(seed, "arithmetic"))
    seen: set[str] = set()
    splits: Splits = {}
    for split in ("test", "select", "adapt"):
        splits[split] = []
        while len(splits[split]) < counts[split]:
            problem = KINDS[len(splits[split]) % len(KINDS)](draw)
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                splits[split].append(problem)
    train: list[Document] = []
    while len(train) < counts["train"]:
        problem = KINDS[len(train) % len(KINDS)](draw)
        if problem.prompt not in seen:
            train.append(problem)
    return {"train": train, **splits}


def read_domains(
    verse_file: Path, news_file: Path, code_folder: Path | None, problems: int, seed: int
) -> dict[str, Splits]:
    """All four domains' documents by split."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    return {
        "verse": verse(verse_file, seed),
        "news": news(news_file, seed),
        "code": code(code_folder or stdlib, seed),
        "arithmetic": arithmetic({"train": problems, "adapt": 400, "select": 200, "test": 400}, seed),
    }


def thin(documents: list[Document], share: float) -> list[Document]:
    """The documents of the base's mixture: the first of a domain's train documents, by characters."""
    whole = sum(len(document.text) for document in documents)
    taken, few = 0, []
    for document in documents:
        rest = int(share * whole) - taken
        if rest <= 0:
            break
        few.append(Document(document.text[:rest]) if len(document.text) > rest else document)
        taken += len(few[-1].text)
    return few


def passages(
    documents: list[Document], lengths: Callable[[Document], list[int]], most: int
) -> Iterator[Document]:
    """Stretches of whole lines of at most `most` tokens, or one longer line; problems as they are.

    Arguments:
        lengths: how many tokens each line of a document has.
    """
    for document in documents:
        if document.answer:
            yield document
            continue
        piece, tokens = "", 0
        for line, count in zip(document.text.splitlines(keepends=True), lengths(document), strict=True):
            if piece and tokens + count > most:
                yield Document(piece)
                piece, tokens = "", 0
            piece, tokens = piece + line, tokens + count
        if piece.strip():
            yield Document(piece)


def rows(documents: list[Document], labelled: bool) -> list[dict[str, Any]]:
    """Rows of a split's file: `prompt`, and where answers may be seen `answer`."""
    return [
        {"prompt": d.prompt, **({"answer": d.answer} if labelled and d.answer else {})} for d in documents
    ]
