"""Documents out of files of records: JSON lines, Parquet and Arrow, one record at a time.

A record that cannot be read is reported with its place, and skipped or the end of the reading, as
`BadRecords` was asked. Parquet and Arrow need the package pyarrow, which is imported when one is
read. Nothing in such a file is ever executed.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from rwkv7.files import json_object

__all__ = ["ON_BAD", "TABLES", "BadRecords", "RecordReader", "json_records", "record_reader"]

ON_BAD = ("stop", "skip")
TABLES = (".parquet", ".arrow")

LONGEST_LINE = 1 << 28  # bytes; what is longer is no record of text but a damaged file
PIECE = 1 << 20  # bytes of such a line passed over at a time
ROWS = 256  # of a table decoded at a time
NAMED = 100  # bad records whose names are kept
TOLD = 20  # bad records named on the way; the rest are counted

Documents = Iterator[tuple[BinaryIO, int]]
RecordReader = Callable[[BinaryIO, Path, str, "BadRecords"], Documents]
_Read = TypeVar("_Read")


class BadRecords:
    """What is done about a record that cannot be read, and which ones there were.

    Attributes:
        count: how many.
        named: "file: line 3: reason" of the first hundred.
    """

    def __init__(self, on_bad: str = "stop", tell: Callable[[str], None] | None = None) -> None:
        """`on_bad` is "stop" (the first one raises ValueError) or "skip"; `tell` then hears, as
        lines for a person, of the first twenty."""
        if on_bad not in ON_BAD:
            raise ValueError(f"on_bad: expected one of {', '.join(ON_BAD)}, found {on_bad!r}")
        self.on_bad, self._tell = on_bad, tell
        self.count = 0
        self.named: list[str] = []

    def add(self, path: Path, place: str, reason: str, records: int = 1) -> None:
        """Counts and names what cannot be read, one record or as many as are lost with it.

        Raises ValueError when the first is to stop the reading.
        """
        lost = "" if records == 1 else f" ({records:,} records)"
        name = f"{path}: {place}{lost}: {' '.join(reason.split()).rstrip('.')}"
        if self.on_bad == "stop":
            raise ValueError(f"{name}. Mend the file, or leave such records out (--on-bad skip)")
        self.count += records
        if len(self.named) < NAMED:
            self.named.append(name)
        if self._tell and len(self.named) <= TOLD:
            self._tell(f"left out: {name}")
        elif self._tell:
            self._tell("left out: more, which are counted at the end")
            self._tell = None

    def first(self) -> str:
        """The end of a sentence about what was not found: how many there were, and the first."""
        return f"; {self.count} bad records, the first: {self.named[0]}" if self.count else ""

    def again(self) -> BadRecords:
        """For reading the same files once more: the same is left out, and nobody told of it."""
        return BadRecords(self.on_bad)

    @staticmethod
    def in_words(count: int) -> str:
        """So many, in a line for a person."""
        records = "1 record" if count == 1 else f"{count:,} records"
        return f"left out: {records} that could not be read"


def record_reader(path: Path) -> RecordReader | None:
    """What reads the records of `path`, by its suffix; None for a file that is plain text.

    A reader takes the open file, its path, the key or column of the text and the `BadRecords`. It
    gives each document as a stream and its length in bytes.
    """
    return _READERS.get(path.suffix.lower())


def json_records(
    file: BinaryIO, path: Path, read: Callable[[dict[str, Any]], _Read], bad: BadRecords
) -> Iterator[_Read]:
    """What `read` makes of each line's object; what it refuses with ValueError is a bad record.

    Args:
        file: open in `path`, which is there for the names of bad records.
        bad: what happens to lines that cannot be read.
    """
    for number in count(1):
        line = file.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(PIECE)
            bad.add(path, f"line {number}", f"longer than {LONGEST_LINE} bytes")
        elif line.strip():
            try:
                # Decoded here, for json takes bytes with a NUL among them for another encoding.
                found = read(json_object(line.rstrip(b"\r\n").decode("utf-8-sig")))
            except json.JSONDecodeError as error:  # whose own words count lines too, and from one
                bad.add(path, f"line {number}", _no_json(error))
            except UnicodeError as error:
                bad.add(path, f"line {number}", _no_text(error))
            except ValueError as error:
                bad.add(path, f"line {number}", str(error))
            else:
                yield found


def _json_lines(file: BinaryIO, path: Path, key: str, bad: BadRecords) -> Documents:
    for text in json_records(file, path, lambda record: _value(record, key), bad):
        yield io.BytesIO(text), len(text)


def _no_json(error: json.JSONDecodeError) -> str:
    return f"expected a JSON object: {error.msg}, character {error.pos + 1}"


def _no_text(error: UnicodeError) -> str:
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"expected UTF-8, found 0x{byte:02x} as byte {error.start + 1}"
    # JSON can spell half of a character that takes two.
    return "expected whole characters, found half of one"


def _value(record: dict[str, Any], key: str) -> bytes:
    if key not in record:
        found = ", ".join(map(repr, list(record)[:5])) or "none"
        raise ValueError(f"expected the key {key!r}, found {found}")
    if not isinstance(record[key], str):
        raise ValueError(f"{key!r}: expected text, found {type(record[key]).__name__}")
    text: str = record[key]
    return text.encode("utf-8")  # UnicodeError for half a surrogate pair


def _parquet(file: BinaryIO, path: Path, key: str, bad: BadRecords) -> Documents:
    arrow = _pyarrow(path)
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        names = table.schema_arrow.names
    except (arrow.ArrowException, OSError) as error:
        bad.add(path, "the whole file", str(error))
        return
    _check_column(names, key, path)
    row = 0
    for group in range(table.num_row_groups):
        batches = table.iter_batches(ROWS, row_groups=[group], columns=[key])
        rows = table.metadata.row_group(group).num_rows
        yield from _batches(batches, range(row, row + rows), f"row group {group}", path, key, bad)
        row += rows


def _arrow(file: BinaryIO, path: Path, key: str, bad: BadRecords) -> Documents:
    arrow = _pyarrow(path)
    is_file = file.read(6) == b"ARROW1"  # else a stream, which is what `datasets` saves
    file.seek(0)
    try:
        reader = arrow.ipc.open_file(file) if is_file else arrow.ipc.open_stream(file)
        names = reader.schema.names
    except (arrow.ArrowException, OSError) as error:
        bad.add(path, "the whole file", str(error))
        return
    _check_column(names, key, path)
    if is_file:
        batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    else:
        batches = iter(reader)
    yield from _batches(batches, range(0), "the rest of the file", path, key, bad)


def _batches(
    batches: Iterator[Any], rows: range, rest: str, path: Path, key: str, bad: BadRecords
) -> Documents:
    """The documents of a table's batches; an error ends them.

    `rows` are their numbers; where only the first is known, those lost count as one.
    """
    arrow, row = _pyarrow(path), rows.start
    while True:
        try:
            batch = next(batches, None)
            column = None if batch is None else _binary(batch.column(key), arrow)
        except (arrow.ArrowException, OSError, ValueError, KeyError) as error:
            bad.add(path, f"{rest}, from row {row}", str(error), max(1, rows.stop - row))
            return
        if column is None:
            return
        for number, value in enumerate(column, row):
            try:
                text = value.as_py()
                if text is None:
                    raise ValueError(f"{key!r}: expected text, found nothing")
                text.decode("utf-8")
            except ValueError as error:
                bad.add(path, f"row {number}", str(error))
            else:
                yield io.BytesIO(text), len(text)
        row += len(column)


def _binary(column: Any, arrow: Any) -> Any:
    """The column as bytes, every offset checked: a damaged file must not lead outside of it."""
    kind = column.type
    if arrow.types.is_dictionary(kind):
        column.validate(full=True)
        column = column.dictionary_decode()
        kind = column.type
    if arrow.types.is_string(kind):
        column = column.view(arrow.binary())
    elif arrow.types.is_large_string(kind):
        column = column.view(arrow.large_binary())
    elif not (arrow.types.is_binary(kind) or arrow.types.is_large_binary(kind)):
        raise ValueError(f"expected a column of text, found {kind}")
    column.validate(full=True)
    return column


def _check_column(names: list[str], key: str, path: Path) -> None:
    if key not in names:
        found = ", ".join(map(repr, names[:5])) or "none"
        raise ValueError(f"{path}: expected the column {key!r}, found {found}: name it with --key")


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"{path}: Parquet and Arrow files need the package pyarrow: run "
            '`pip install "rwkv7[data]"`'
        ) from error
    return pyarrow


_READERS: dict[str, RecordReader] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
