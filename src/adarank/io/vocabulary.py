"""Which token each row of an embedding table stands for, read from a model's folder. Runs no code, asks no network.

A vocabulary may lie there in several kinds of file; all but SentencePiece's and tiktoken's give tokens the ids that the
model uses. Those two number pieces, which some models move by a few: they compare with files of their own kind alone.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adarank.errors import CheckpointError
from adarank.io.files import file_sha256
from adarank.io.parsing import parse_json

TOKENIZER, CONFIG, ADDED = "tokenizer.json", "tokenizer_config.json", "added_tokens.json"
TOKENS = (TOKENIZER, "vocab.json", "vocab.txt")
PIECES = ("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.bpe.model", "sentencepiece.model")
FILES = (*TOKENS, *PIECES, CONFIG, ADDED, "merges.txt")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their ids.

    Attributes:
        file: what the tokens were read from, added ones apart.
        ids: token -> id, which is a row of the embedding table. Added tokens come last.
        merges: the pairs that byte-pair encoding joins, in order; empty if the files tell none.
        text: what is done to text before it is split, as far as the files tell: name of a setting -> value.
    """

    file: Path
    ids: Mapping[str, int]
    merges: tuple[str, ...] = ()
    text: Mapping[str, Any] = field(default_factory=dict)


def files_of(folder: Path) -> list[str]:
    """The files of a folder that hold a whole vocabulary, the first to be read first."""
    return [name for name in (*TOKENS, *PIECES) if (folder / name).is_file()]


def kinds_of(folder: Path) -> list[str]:
    """The kinds of vocabulary that a folder holds, `tokens` before `pieces`."""
    return list(dict.fromkeys("tokens" if name in TOKENS else "pieces" for name in files_of(folder)))


def comparable(folders: Mapping[str, Path]) -> tuple[list[str], str | None]:
    """Which of some folders hold a vocabulary, and the kind that all of these hold; None if there is none."""
    kinds = {name: listed for name, folder in folders.items() if (listed := kinds_of(folder))}
    shared = next((kind for kind in ("tokens", "pieces") if all(kind in listed for listed in kinds.values())), None)
    return list(kinds), shared


def fingerprint(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 of all that a vocabulary is read from: equal ones need not be read to be compared."""
    return {name: file_sha256(folder / name) for name in FILES if (folder / name).is_file()}


def read_vocabulary(folder: Path, kind: str | None = None) -> Vocabulary | None:
    """The vocabulary of the tokenizer in a folder; None if there is none, as beside a model of bytes or images.

    Arguments:
        kind: `tokens` or `pieces` as `kinds_of` gives them; by default the first.

    Raises:
        CheckpointError: a file of it is damaged.

    Example:
        read_vocabulary(Path("models/base")).ids["cat"]
    """
    files = [name for name in files_of(folder) if kind is None or (name in TOKENS) == (kind == "tokens")]
    if not files:
        return None
    file = folder / files[0]
    vocabulary = _read(file, _READERS.get(file.name, _pieces))
    config = _read(folder / CONFIG, _object) if (folder / CONFIG).is_file() else {}
    added = _read(folder / ADDED, _object) if (folder / ADDED).is_file() else {}
    ids = {**vocabulary.ids, **_integers(folder / ADDED, added), **_decoder(folder / CONFIG, config)}
    text = {**vocabulary.text, **{key: config[key] for key in ("do_lower_case",) if key in config}}
    merges = vocabulary.merges or _merges(folder / "merges.txt")
    return Vocabulary(file, ids, merges, text)


class VocabularyReader:
    """Reads every vocabulary once, however many folders hold its files and however often it is asked for."""

    def __init__(self) -> None:
        self._marks: dict[Path, tuple[tuple[str, str], ...]] = {}
        self._known: dict[tuple[tuple[tuple[str, str], ...], str | None], Vocabulary | None] = {}

    def mark(self, folder: Path) -> tuple[tuple[str, str], ...]:
        """What tells a folder's vocabulary from others: `fingerprint`, in an order."""
        if folder not in self._marks:
            self._marks[folder] = tuple(sorted(fingerprint(folder).items()))
        return self._marks[folder]

    def read(self, folder: Path, kind: str | None = None) -> Vocabulary | None:
        """As `read_vocabulary`; its `file` may be one of the same content in another folder.

        Raises:
            CheckpointError: a file of it is damaged.
        """
        key = (self.mark(folder), kind)
        if key not in self._known:
            self._known[key] = read_vocabulary(folder, kind)
        return self._known[key]


def _read(file: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(file)
    except (ValueError, OSError, LookupError, TypeError, AttributeError, OverflowError, struct.error) as error:
        raise CheckpointError(
            f"{file}: no readable vocabulary ({str(error)[:160]}). Copy or download it again, or remove it if it is not the model's."
        ) from None


def _object(file: Path) -> dict[str, Any]:
    content = parse_json(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"a JSON object was needed, got a {type(content).__name__}")
    return content


def _integers(file: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """A table of ids as it is; of tables by language, one of all their tokens with the language before each."""
    ids: dict[str, int] = {}
    for token, number in content.items():
        if isinstance(number, dict):
            ids |= {f"{token}/{inner}": row for inner, row in _integers(file, number).items()}
        elif isinstance(number, int) and not isinstance(number, bool):
            ids[token] = number
        else:
            raise CheckpointError(f"{file}: token {token!r} has {str(number)[:40]!r} for its id. Give whole numbers.")
    return ids


def _token(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"token {str(value)[:40]!r} is no text")
    return value


def _tokenizer_json(file: Path) -> Vocabulary:
    """The format of the library `tokenizers`."""
    content = _object(file)
    model = content["model"]
    listed = model["vocab"]
    ids = (
        _integers(file, listed)
        if isinstance(listed, dict)
        else {_token(entry[0]): row for row, entry in enumerate(listed)}
    )
    ids |= {_token(entry["content"]): int(entry["id"]) for entry in content.get("added_tokens") or ()}
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ())
    return Vocabulary(file, ids, merges, {key: content.get(key) for key in ("normalizer", "pre_tokenizer")})


def _vocab_json(file: Path) -> Vocabulary:
    return Vocabulary(file, _integers(file, _object(file)))


def _vocab_txt(file: Path) -> Vocabulary:
    """A token on each line, from id 0 on. Of a token on several lines the last counts, as in `transformers`."""
    lines = file.read_text(encoding="utf-8").split("\n")
    return Vocabulary(file, {token: row for row, token in enumerate(lines[:-1] if lines[-1] == "" else lines)})


def _pieces(file: Path) -> Vocabulary:
    content = file.read_bytes()
    lines = content.split(b"\n", 1)[0].split(b" ")
    of_bytes = len(lines) == 2 and lines[1].strip().isdigit()
    return Vocabulary(file, dict(_tiktoken(content)) if of_bytes else {t: i for i, t in enumerate(_sentencepiece(content))})  # fmt: skip


def _tiktoken(content: bytes) -> Iterator[tuple[str, int]]:
    """A line for each token: its bytes in base64, and its rank."""
    for line in content.splitlines():
        if line:
            token, rank = line.split(b" ")
            try:
                yield base64.b64decode(token, validate=True).decode("latin-1"), int(rank)
            except binascii.Error as error:
                raise ValueError(f"a token is no base64: {error}") from None


def _sentencepiece(content: bytes) -> list[str]:
    """The pieces of a SentencePiece model in order: field 1 of its message, and of each its field 1."""
    pieces = [next(text for number, text in _fields(piece) if number == 1) for number, piece in _fields(content) if number == 1]  # fmt: skip
    if not pieces:
        raise ValueError("neither a SentencePiece model nor a table of tiktoken")
    return [piece.decode("utf-8") for piece in pieces]


def _fields(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each field of a protobuf message that has a length; others are passed over."""
    place = 0
    while place < len(content):
        key, place = _varint(content, place)
        kind = key & 7
        if kind == 0:
            _, place = _varint(content, place)
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"no protobuf message (a field of type {kind})")
        size, place = _varint(content, place) if kind == 2 else ({1: 8, 5: 4}[kind], place)
        if place + size > len(content):
            raise ValueError("cut short")
        if kind == 2:
            yield key >> 3, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    """(number, place after it): seven bits a byte, the lowest first, the high bit set but in the last."""
    number = 0
    for shift in range(0, 64, 7):
        if place >= len(content):
            raise ValueError("cut short")
        byte = content[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("no protobuf message (a number of more than 64 bits)")


def _decoder(file: Path, config: Mapping[str, Any]) -> dict[str, int]:
    """The added tokens that tokenizer_config.json lists by id."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        return {_token(entry["content"]): int(number) for number, entry in listed.items()}
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: added_tokens_decoder is no table of tokens ({error}). Copy or download it again."
        ) from None


def _merges(file: Path) -> tuple[str, ...]:
    """The lines of merges.txt after the version that it may begin with."""
    if not file.is_file():
        return ()
    lines: Iterable[str] = _read(file, lambda path: path.read_text(encoding="utf-8").split("\n"))
    return tuple(line for line in lines if line and not line.startswith("#version"))


_READERS: dict[str, Callable[[Path], Vocabulary]] = {
    TOKENIZER: _tokenizer_json,
    "vocab.json": _vocab_json,
    "vocab.txt": _vocab_txt,
}
