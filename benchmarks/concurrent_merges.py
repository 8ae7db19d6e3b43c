"""Pairs of merges that write to the same output at the same time.

    python benchmarks/concurrent_merges.py [--pairs 200] [--seed 0]

The two merges of a pair are of different methods and start up to 0.3 s apart; in some pairs an older output is there and
one or both are forced. Afterwards the output must be, bit for bit, that of one method, which its record names; nothing
may lie beside it; and whoever did not write it must have said so in a sentence, unless it came after the other had ended.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path

from trials import Child, State, fork, fresh, make_zoo, run, state

METHODS = ("cart", "task_arithmetic", "ties", "emr", "adarank")


def race(folder: Path, pairs: int, seed: int) -> Counter[str]:
    """Run the pairs; returns how many ended in which way, and raises at one that ended badly."""
    zoo = make_zoo(folder / "zoo")
    wanted: dict[str, State] = {}
    for name in METHODS:
        run(["merge", str(zoo / f"{name}.yaml"), str(folder / "wanted" / name)], folder / "said")
        found = state(folder / "wanted" / name)
        assert found is not None
        wanted[name] = found
    draw, ends = random.Random(seed), Counter[str]()
    for number in range(pairs):
        ends[_pair(folder, zoo, wanted, draw, number)] += 1
    return ends


def _pair(folder: Path, zoo: Path, wanted: dict[str, State], draw: random.Random, number: int) -> str:
    """One pair; returns how it ended."""
    names = draw.sample(METHODS, 2)
    old = draw.choice([None, None, *(name for name in METHODS if name not in names)])
    forced = draw.choice([[True, True], [True, False], [False, True]]) if old else [False, draw.random() < 0.3]
    place = fresh(folder / "place")
    out = place / "out"
    if old:
        shutil.copytree(folder / "wanted" / old, out)
    children: list[Child] = []
    for name, force in zip(names, forced, strict=True):
        command = ["merge", str(zoo / f"{name}.yaml"), str(out), "--no-report", *(["--force"] if force else [])]
        children.append(fork(command, folder / f"said-{len(children)}"))
        if len(children) == 1:
            time.sleep(draw.choice([0, 0, draw.uniform(0, 0.1), draw.uniform(0, 0.3)]))
    codes = [child.wait() for child in children]
    said = [child.said().strip() for child in children]
    return _judged(place, wanted, names, forced, old, codes, said, number)


def _judged(
    place: Path,
    wanted: dict[str, State],
    names: list[str],
    forced: list[bool],
    old: str | None,
    codes: list[int],
    said: list[str],
    number: int,
) -> str:
    """How a pair ended, in words."""
    found = state(place / "out")
    method = json.loads((place / "out" / "adarank.json").read_text())["recipe"]["merge_method"] if found else None
    owner = next((name for name, own in wanted.items() if own == found), None)
    case = f"pair {number}: {names}, forced {forced}, over {old}, codes {codes}, {said}"
    assert owner is not None, f"mixed, incomplete or missing, {case}"
    assert {"ties": "ties_merging"}.get(owner, owner) == method, f"the record says {method}, {case}"
    assert [path.name for path in place.iterdir()] == ["out"], f"left behind: {sorted(place.iterdir())}, {case}"
    done = [name for name, code in zip(names, codes, strict=True) if code == 0]
    assert owner in done, f"the output is {owner}'s, {case}"
    refusals = [text for code, text in zip(codes, said, strict=True) if code]
    assert all(code in (0, 1) for code in codes), case
    for text in refusals:
        sentence = text.splitlines()[-1]
        assert sentence.startswith("adarank: "), case
        assert "Traceback" not in text, case
        assert "another run is writing there" in sentence or "already exists" in sentence, case
    if len(done) == 2:
        assert forced[1] or forced[0], case
        return "one after the other, forced"
    assert done, case
    return "one good output, one sentence: " + ("held" if "another run" in refusals[0] else "already exists")


def main() -> None:
    """Run the pairs that are asked for, and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="adarank-races-") as folder:
        ends = race(Path(folder), options.pairs, options.seed)
    for end, count in ends.most_common():
        print(f"{count:5d}  {end}")
    print(f"{options.pairs:5d}  pairs; mixed, incomplete or stray: 0")


if __name__ == "__main__":
    main()
