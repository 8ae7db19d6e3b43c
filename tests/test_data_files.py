"""Files of rows: every format gives the same table, and damaged files are refused with a place."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adarank.data.read import Table, read_table
from adarank.errors import DataError
from make import write_rows

ROWS = {"text": ["plain", 'say "hi"', "tab, comma", "ünï"], "label": ["0", "1", "0", "1"]}


SUFFIXES = ["tsv", "csv", "jsonl", "parquet", "npz"]


def plain(table: Table) -> dict[str, list[Any]]:
    return {name: [str(value) for value in values] for name, values in table.items()}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path, suffix, ROWS)
    assert plain(read_table(source, tmp_path, ["text", "label"])) == ROWS
    assert plain(read_table(str(tmp_path / source), Path("/nowhere"), ["text"], ["label"])) == ROWS
    assert set(read_table(source, tmp_path, ["text"], ["other"])) == {"text"}


TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(lambda t: t.strip() == t)


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet"])
@given(texts=st.lists(TEXT, min_size=1, max_size=6))
def test_any_text_survives_every_format(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, texts: list[str]
) -> None:
    folder = tmp_path_factory.mktemp("text")
    source = write_rows(folder, suffix, {"text": texts, "label": ["0"] * len(texts)})
    assert list(read_table(source, folder, ["text"])["text"]) == texts


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_only_line_feeds_end_a_row(tmp_path: Path, suffix: str, separator: str) -> None:
    texts = [f"one{separator}two", "three"]
    source = write_rows(tmp_path, suffix, {"text": texts, "label": ["0", "1"]})
    assert read_table(source, tmp_path, ["text"])["text"] == texts


def test_line_feeds_inside_quotes_are_text_in_csv(tmp_path: Path) -> None:
    source = write_rows(tmp_path, "csv", {"text": ["a\nb", "c\r\nd"], "label": ["0", "1"]})
    assert read_table(source, tmp_path, ["text"])["text"] == ["a\nb", "c\r\nd"]


def test_long_fields_are_read_or_refused(tmp_path: Path) -> None:
    """Python's csv module stops at 131,072 characters unless told otherwise."""
    for suffix in ("tsv", "csv"):
        source = write_rows(tmp_path, suffix, {"text": ["x" * 140_000], "label": ["0"]})
        with suppress(DataError):
            assert len(read_table(source, tmp_path, ["text"])["text"][0]) == 140_000


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path, suffix, ROWS)
    (tmp_path / source).write_bytes(b"\xef\xbb\xbf" + (tmp_path / source).read_bytes())
    assert plain(read_table(source, tmp_path, ["text", "label"])) == ROWS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_column_is_named_with_those_there_are(tmp_path: Path, suffix: str) -> None:
    source = write_rows(tmp_path, suffix, ROWS)
    with pytest.raises(DataError) as caught:
        read_table(source, tmp_path, ["sentence", "text", "pair"])
    assert all(part in str(caught.value) for part in ("'sentence', 'pair'", "'text', 'label'", source))


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\xfe", b"PK\x03\x04broken", b"\xff" * 50, b"PAR1PAR1", b"3\n", b"[1]\n"]
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    (tmp_path / f"rows.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match="rows"):
        read_table(f"rows.{suffix}", tmp_path, ["text", "label"])


@pytest.mark.parametrize("suffix", ["tsv", "csv", "jsonl", "parquet", "npz"])
@pytest.mark.parametrize("share", [0.2, 0.6, 0.9])
def test_a_truncated_file_is_refused_or_whole_rows(tmp_path: Path, suffix: str, share: float) -> None:
    source = write_rows(tmp_path, suffix, {"text": [f"row {i}" for i in range(9)], "label": ["0"] * 9})
    content = (tmp_path / source).read_bytes()
    (tmp_path / source).write_bytes(content[: int(share * len(content))])
    try:
        table = read_table(source, tmp_path, ["text", "label"])
    except DataError:
        return
    assert len(table["text"]) == len(table["label"]) < 9


@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_a_header_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_table(write_rows(tmp_path, suffix, {"text": [], "label": []}), tmp_path, ["text"])


@pytest.mark.parametrize(("suffix", "content", "where"), [
    ("tsv", "text\tlabel\na\t0\nb\n", "line 3"), ("tsv", "text\tlabel\na\tb\t0\n", "line 2"),
    ("csv", "text,label\na,0\nb,1,2\n", "line 3"), ("jsonl", '{"text": "a", "label": 0}\n{"text": "b"}\n', "row 2"),
    ("jsonl", '{"text": "a"}\n{"text": \n', "rows"), ("jsonl", '"text"\n', "rows"),
])  # fmt: skip
def test_ragged_rows_are_refused_with_their_place(tmp_path: Path, suffix: str, content: str, where: str) -> None:
    (tmp_path / f"rows.{suffix}").write_text(content)
    with pytest.raises(DataError, match=where):
        read_table(f"rows.{suffix}", tmp_path, ["text", "label"])


def test_arrays_of_different_lengths_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", image=np.zeros((3, 2)), label=np.zeros(2))
    with pytest.raises(DataError, match=r"rows\.npz"):
        read_table("rows.npz", tmp_path, ["image", "label"])


def test_arrays_without_rows_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", image=np.array(3.0), label=np.array(1))
    with pytest.raises(DataError, match=r"rows\.npz"):
        read_table("rows.npz", tmp_path, ["image", "label"])


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", text=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"rows\.npz"):
        read_table("rows.npz", tmp_path, ["text"])


@pytest.mark.parametrize("name", ["rows.xlsx", "rows", "rows.json"])
def test_an_unknown_suffix_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=r"\.tsv, \.csv, \.jsonl, \.parquet, \.npz"):
        read_table(name, tmp_path, ["text"])


def test_a_missing_file_is_refused_with_its_whole_path(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=str(tmp_path / "none.tsv")):
        read_table("none.tsv", tmp_path, ["text"])


def test_an_image_folder_has_a_class_per_sub_folder(tmp_path: Path) -> None:
    for name in ("dog/2.PNG", "cat/1.jpg", "cat/0.jpeg", "cat/notes.txt", "top.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    table = read_table(str(tmp_path), tmp_path, ["image", "label"])
    assert [Path(p).relative_to(tmp_path).as_posix() for p in table["image"]] == [
        "cat/0.jpeg",
        "cat/1.jpg",
        "dog/2.PNG",
    ]
    assert table["label"] == ["cat", "cat", "dog"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows"):
        read_table(str(tmp_path), tmp_path, ["image"])
