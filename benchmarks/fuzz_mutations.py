"""Mutations of files for `fuzz.py`: of bytes, of trees as JSON, YAML and pickles hold them, of tables and archives."""

from __future__ import annotations

import copy
import io
import json
import random
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

Tree = Any
YAML = [
    "!!bool maybe", "!!int x", "!!float x", "!!null x", "!!timestamp x", "2001-12-14", "2001-99-99", "!!binary aGk=", "!!binary =x", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.system ['touch fuzzed']", "!!python/name:os.system", "!unknown x", "*nowhere",
    "&a [*a]", "&a {b: *a}", "{<<: 3}", "{? [a]: b}", "{1: a, 2: b}", "[" * 60, "{a: " * 60, "[" * 1500, "- - - -", "\t x", "'", "%TAG", "| x", "? ", "\x00", "é" * 300, "---\na: 1",
    "{a: &a [x, x, x, x, x, x, x, x, x], b: &b [*a, *a, *a, *a, *a, *a, *a, *a], c: &c [*b, *b, *b, *b, *b, *b, *b, *b], d: &d [*c, *c, *c, *c, *c, *c, *c, *c],"
    " e: &e [*d, *d, *d, *d, *d, *d, *d, *d], f: &f [*e, *e, *e, *e, *e, *e, *e, *e], g: &g [*f, *f, *f, *f, *f, *f, *f, *f], h: [*g, *g, *g, *g, *g, *g, *g, *g]}",
]  # fmt: skip


def odd(rng: random.Random) -> Tree:
    """A value that nobody expects."""
    nested: Tree = "x"
    for _ in range(rng.choice([3, 30, 90])):
        nested = [nested] if rng.random() < 0.5 else {"a": nested}
    return rng.choice([
        None, True, False, -1, 0, 1, 2, 7, 10**6, 2**31, 2**63, 10**30, -(10**12), 0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), "", " ", "x", "0", "1e400",
        "nan", "a" * 300, "a" * 5000, "\ud800", "x\udfffy", "\0", "a\0b", "é", "\u2028", "..", ".", "/", "../../outside", "/dev/null", "/dev/zero", "/proc/self/mem", "/nowhere", "~", "*", "[", "[]",
        "{}", "a.b.c", "a b", [], {}, [[]], [None], ["x", 1], [1, 2, 3], {"": ""}, {"a": 1}, {"x\0": [1]}, nested, [0] * 200, ["x"] * 200,
    ])  # fmt: skip


def _places(tree: Tree, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return [path, *(place for key, own in items for place in _places(own, (*path, key)))]


def _at(tree: Tree, path: tuple[Any, ...]) -> Tree:
    for key in path:
        tree = tree[key]
    return tree


def mutated_tree(rng: random.Random, tree: Tree, odd: Callable[[random.Random], Tree] = odd) -> Tree:
    """A copy of plain data with one to three changes."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = [place for place in _places(tree) if place]
        if not places or rng.random() < 0.02:
            return odd(rng)
        *path, key = rng.choice(places)
        holder = _at(tree, tuple(path))
        if isinstance(holder, tuple):
            continue
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "a" * 300, "\ud800", "__class__", "../x", str(key).upper(), 3])] = holder.pop(
                key
            )
        elif kind == 2:
            holder[key] = copy.deepcopy(_at(tree, rng.choice(places)))
        elif kind == 3:
            holder[key] = rng.choice([[holder[key]], {"a": holder[key]}, str(holder[key]), [holder[key]] * 2])
        elif kind == 4 and isinstance(holder[key], (int, float)):
            holder[key] = rng.choice(
                [holder[key] + 1, -holder[key], holder[key] * 1000, holder[key] + 0.5, str(holder[key])]
            )
        else:
            holder[key] = odd(rng)
    return tree


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bit flips, cuts, copies and insertions."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, size = rng.randrange(max(1, len(data))), rng.choice([1, 2, 8, 64])
        kind = rng.randrange(7)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + size]
        elif kind == 3:
            data[at : at + size] = bytes(size)
        elif kind == 4:
            data[at:at] = data[max(0, at - size) : at]
        elif kind == 5:
            data[at:at] = rng.choice(
                [rng.randbytes(size), b"\xff" * size, b"[" * size, b'"', b"\xed\xa0\x80", b"\0", b"\n", b","]
            )
        else:
            data[at : at + size] = rng.choice([b"\xff", b"9", b"-", b"e", b"\x7f"]) * size
    return bytes(data if rng.random() > 0.01 else b"")


def mutated_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file with its tree or its bytes changed."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, content)
    return json.dumps(mutated_tree(rng, json.loads(content))).encode()


def mutated_yaml(rng: random.Random, content: bytes) -> bytes:
    """A YAML file with its tree, a line or its bytes changed."""
    kind = rng.random()
    if kind < 0.15:
        return mutated_bytes(rng, content)
    if kind < 0.4:
        lines = content.decode().splitlines()
        at = rng.randrange(len(lines))
        key = lines[at].partition(":")[0]
        lines[at] = rng.choice(
            [f"{key}: {rng.choice(YAML)}", rng.choice(YAML), lines[at] + "\n" + lines[at], "  " + lines[at]]
        )
        return "\n".join(lines).encode(errors="surrogatepass")
    if kind < 0.45:
        return content.decode().encode(rng.choice(["utf-16", "utf-8-sig", "utf-32"]))
    tree = mutated_tree(rng, yaml.safe_load(content))
    return yaml.safe_dump(tree, allow_unicode=rng.random() < 0.5).encode(errors="surrogatepass")


def mutated_safetensors(rng: random.Random, content: bytes) -> bytes:
    """A safetensors file with its header's tree, or its bytes, changed."""
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.25:
        return mutated_bytes(rng, content)
    header = json.loads(content[8 : 8 + size])
    inner = header.get("__metadata__", {}).get("header")
    if inner and rng.random() < 0.7:
        header["__metadata__"]["header"] = json.dumps(mutated_tree(rng, json.loads(inner)))
    else:
        header = mutated_tree(rng, header)
    text = json.dumps(header).encode()
    length = len(text) if rng.random() > 0.05 else rng.choice([0, 1, 2**63, len(text) + 1])
    body = content[8 + size :] if rng.random() > 0.1 else mutated_bytes(rng, content[8 + size :])
    return length.to_bytes(8, "little") + text + body


def odd_leaf(rng: random.Random) -> Tree:
    """A value that a pickle may hold where a tensor is expected."""
    made = [
        torch.zeros(0), torch.zeros(2, 0, 3), torch.zeros(()), torch.full((6, 4), float("nan")), torch.full((6, 4), float("inf")), torch.arange(24).reshape(6, 4),
        torch.zeros(6, 4, dtype=torch.complex64), torch.zeros(6, 4, dtype=torch.bool), torch.zeros(6, 4, dtype=torch.int8), torch.zeros(6, 4).to_sparse(), torch.zeros(1).expand(6, 4),
        torch.zeros(6, 4, device="meta"), torch.zeros(4, 6).T, torch.nn.Parameter(torch.zeros(6, 4)), torch.quantize_per_tensor(torch.zeros(6, 4), 0.1, 0, torch.qint8), torch.full((6, 4), 1e38),
        torch.zeros(6, 4, dtype=torch.float8_e4m3fn), torch.zeros(6, 4, dtype=torch.uint16), torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]), torch.Size([1, 2]), torch.float32,
    ]  # fmt: skip
    return rng.choice(made) if rng.random() < 0.7 else odd(rng)


def mutated_pickle(rng: random.Random, content: bytes) -> bytes:
    """A file of `torch.save` with what it holds, its archive's members, or its bytes changed."""
    kind = rng.random()
    if kind < 0.3:
        return mutated_bytes(rng, content)
    if kind < 0.45:
        return mutated_zip(rng, content)
    tree = mutated_tree(rng, torch.load(io.BytesIO(content), weights_only=True), odd_leaf)
    out = io.BytesIO()
    try:
        torch.save(tree, out, _use_new_zipfile_serialization=rng.random() < 0.8)
    except (RuntimeError, NotImplementedError, OverflowError, AttributeError, TypeError):
        return mutated_bytes(rng, content)
    return out.getvalue()


def mutated_zip(rng: random.Random, content: bytes) -> bytes:
    """A zip archive with a member lost, doubled, changed, compressed, renamed or marked as encrypted."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", rng.choice([0, 8])) as new:
        names = old.namelist()
        at = rng.choice(names)
        kind = rng.randrange(6)
        for name in names:
            data = old.read(name)
            if name != at:
                new.writestr(name, data)
            elif kind == 1:
                new.writestr(rng.choice(["../x", "x", "", "/etc/x", "a" * 300, "x.npy"]), data)
            elif kind == 2:
                new.writestr(name, mutated_bytes(rng, data))
            elif kind == 3:
                new.writestr(name, data, 12)
            elif kind == 4:
                new.writestr(name, rng.choice([b"", b"\x80\x02.", b"\x93NUMPY\x01\x00", bytes(64)]))
            elif kind == 5:
                new.writestr(name, data)
                new.writestr(name + "2", data)
    made = bytearray(out.getvalue())
    if rng.random() < 0.2:  # the bit that says that members are encrypted, in both places
        for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            place = made.find(mark)
            if place >= 0:
                made[place + offset] |= 1
    return bytes(made)


def mutated_table(rng: random.Random, separator: str, content: bytes) -> bytes:
    """Delimited text with fields, lines or bytes changed."""
    if rng.random() < 0.3:
        return mutated_bytes(rng, content)
    rows = [line.split(separator) for line in content.decode().splitlines()]
    for _ in range(rng.choice([1, 2, 3])):
        row = rng.choice(rows)
        at = rng.randrange(len(row))
        kind = rng.randrange(6)
        if kind == 0:
            row.insert(at, "x")
        elif kind == 1:
            del row[at]
            if not row:
                rows.remove(row)
        elif kind == 2:
            rows = rows[: rng.choice([0, 1, 2])] or rows[:1]
        elif kind == 3:
            row[at] = rng.choice(
                [
                    '"',
                    "\0",
                    "\ud800",
                    "\r",
                    "a" * 200_000,
                    "",
                    "-1",
                    "1e400",
                    "nan",
                    "9" * 5000,
                    "\u2028",
                    " 1 ",
                    "1.0",
                    "0x1",
                ]
            )
        else:
            row[at] = str(odd(rng))
    return "\n".join(separator.join(row) for row in rows).encode(errors="surrogatepass")


def mutated_arrays(rng: random.Random, content: bytes) -> bytes:
    """An npz file with its arrays, members or bytes changed."""
    kind = rng.random()
    if kind < 0.25:
        return mutated_bytes(rng, content)
    if kind < 0.5:
        return mutated_zip(rng, content)
    arrays = dict(np.load(io.BytesIO(content)))
    name = rng.choice(list(arrays))
    own = arrays[name]
    changes: list[Callable[[], Any]] = [
        lambda: own[:0], lambda: own[:1], lambda: own.astype("f4") * np.nan, lambda: own.astype("i8") * 10**12, lambda: own.astype("c8"), lambda: own.astype("U8"), lambda: own.astype("S3"),
        lambda: np.array(3), lambda: own.astype("M8[s]"), lambda: np.zeros((len(own), 2), [("a", "i4")]), lambda: own.reshape(len(own), -1), lambda: np.zeros((len(own), 0, 3), "u1"),
        lambda: own.astype("?"), lambda: np.zeros((len(own), 1, 1, 1, 1), "u1"), lambda: own.astype(">i4"), lambda: np.asfortranarray(own), lambda: np.array([{}] * len(own), dtype=object),
        lambda: np.zeros((len(own), 5, 5, 7), "u1"), lambda: own.astype("f8") + 0.5, lambda: own - own - 1, lambda: own.astype("u8") + np.uint64(2**63), lambda: np.zeros((len(own), 1, 20000), "u1"),
    ]  # fmt: skip
    arrays[name] = rng.choice(changes)()
    if rng.random() < 0.2:
        arrays[rng.choice(["x", "", "a/b", "\ud800"]).encode(errors="ignore").decode()] = arrays.pop(name)
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def picture(rng: random.Random) -> bytes:
    """An image file of an odd mode, size or format, perhaps damaged."""
    mode = rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
    form = rng.choice(["PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM"])
    out = io.BytesIO()
    try:
        Image.new(mode, rng.choice([(16, 16), (1, 1), (3, 40), (1, 3000)])).save(out, form)
    except (OSError, ValueError, KeyError):
        return rng.randbytes(80)
    return mutated_bytes(rng, out.getvalue()) if rng.random() < 0.6 else out.getvalue()
