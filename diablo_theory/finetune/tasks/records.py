"""Published data sets as records: from a folder that the user has, or from where they are published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diablo_theory.errors import ConfigError, DataUnavailableError
from diablo_theory.finetune.tasks.base import Split
from diablo_theory.finetune.tasks.downloads import download

#: Where the files of GitHub's repositories are served.
GITHUB = "https://raw.githubusercontent.com"
SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Source:
    """Where a data set is published, and what it is called on disk.

    Attributes:
        place: Its id on the hub, or owner/name on GitHub.
        fields: What every record must have, as text or a number.
        splits: Split to its name there: the hub's split, or the file's path in the repository on GitHub.
        folders: Under ``data_root``, each searched for ``train`` and ``test`` with any of :data:`SUFFIXES`.
        licence: As seen, with what a user has to know before fetching.
        sizes: Split to how many records it has as published, where that is known exactly.
        host: ``hub`` or ``github``.
        config: The hub's name of the variant.
        revision: Branch or commit. A branch such as ``main`` moves, so it does not say which data a run saw: the
            digest that the run keeps of what it read does (see :func:`digest`).
        files: Split to further places of its file under ``data_root``.
        optional: Fields that a record may lack; empty then.
        aliases: Field to another name that copies of the set use for it.
    """

    place: str
    fields: tuple[str, ...]
    splits: Mapping[Split, str]
    folders: tuple[str, ...]
    licence: str
    sizes: Mapping[Split, int] = field(default_factory=dict)
    host: Literal["hub", "github"] = "hub"
    config: str | None = None
    revision: str = "main"
    files: Mapping[Split, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)

    def candidates(self, split: Split) -> list[str]:
        """Where the split may lie under ``data_root``, the first one found is taken."""
        usual = [f"{folder}/{split}{suffix}" for folder in self.folders for suffix in SUFFIXES]
        return [*usual, *self.files.get(split, ())]


class Record(dict[str, str]):
    """The fields of one record, and where it stands.

    Args:
        values: Field to text.
        file: The file, or the place and revision.
        number: From 1.
    """

    def __init__(self, values: Mapping[str, str], file: str, number: int) -> None:
        super().__init__(values)
        self.file, self.number = file, number

    def error(self, problem: str) -> ConfigError:
        """What to raise when the record cannot be used."""
        return ConfigError(f"{self.file}, record {self.number:,}: {problem}")


def load(source: Source, split: Split, data_root: Path | None = None, *, whole: bool = False) -> list[Record]:
    """All records of a split, in the published order.

    Args:
        source: The data set.
        split: One of the source's.
        data_root: A folder with the set in its public form; None fetches it.
        whole: A file that is cut between two records, or holds another set, can only be told by its length: refuse
            any but the published one.

    Raises:
        ConfigError: If the folder does not exist, or a file is damaged, empty, of another form or not whole.
        DataUnavailableError: If the set is not in the folder, or cannot be fetched.
    """
    if data_root is not None:
        path = _find(source, split, data_root)
        file, rows = str(path), _read(path)
    else:
        file, rows = _fetch(source, split)
    if not rows:
        raise ConfigError(f"{file} holds no records")
    if whole and len(rows) != (known := source.sizes.get(split, len(rows))):
        raise not_whole(file, len(rows), f"the {split} split of {source.place} has {known:,}")
    return [_record(source, row, file, number) for number, row in enumerate(rows, start=1)]


def not_whole(file: object, count: int, published: str) -> ConfigError:
    """What to raise for a set that has not the length that it is published with."""
    return ConfigError(
        f"{file} holds {count:,} records; {published}: is it cut, or another set? "
        "Only a run of small scale may use it."
    )


def digest(records: Iterable[Mapping[str, Any]]) -> str:
    """SHA-256 of the content, so that a run can say which data it saw.

    Args:
        records: Records, or examples as ``map(dataclasses.asdict, examples)``. Their order counts, that of the
            fields does not.
    """
    hashed = hashlib.sha256()
    for record in records:
        # A flag that is off adds nothing, so that a new one changes no digest of what was there before it.
        said = {key: value for key, value in record.items() if value is not False}
        hashed.update(json.dumps(said, sort_keys=True).encode() + b"\n")
    return hashed.hexdigest()


def _find(source: Source, split: Split, data_root: Path) -> Path:
    if not data_root.is_dir():
        raise ConfigError(f"data_root: {data_root} is not a folder")
    candidates = source.candidates(split)
    for candidate in candidates:
        if (data_root / candidate).is_file():
            return data_root / candidate
    raise DataUnavailableError(
        f"{data_root} has none of {', '.join(candidates)}. Put the {split} split of {_named(source)} there, "
        "or leave data_root out to fetch it."
    )


def _named(source: Source) -> str:
    return f"{source.place} ({'GitHub' if source.host == 'github' else 'Hugging Face hub'}; {source.licence})"


def _fetch(source: Source, split: Split) -> tuple[str, Sequence[object]]:
    fetch = _from_github if source.host == "github" else _from_hub
    try:
        return fetch(source, source.splits[split])
    except ConfigError:
        raise
    except Exception as error:  # offline, gated, withdrawn, renamed: each has its own, in three libraries
        raise DataUnavailableError(
            f"{_named(source)}, revision {source.revision}, split {split}, could not be fetched "
            f"({type(error).__name__}: {error}). Put it into a folder as {source.candidates(split)[0]} and give "
            "data_root=FOLDER; fetching needs the network."
        ) from error


def _from_hub(source: Source, split: str) -> tuple[str, Sequence[object]]:
    from datasets import load_dataset

    rows = load_dataset(source.place, source.config, split=split, revision=source.revision)
    return f"{source.place}@{source.revision}, split {split}", list(rows)


def _from_github(source: Source, path: str) -> tuple[str, Sequence[object]]:
    address = f"{GITHUB}/{source.place}/{source.revision}/{path}"
    kept = download(address)
    try:
        # The reader below names a bad record; datasets' own JSON reader needs columns of one type.
        return address, _read_text(kept, address)
    except ConfigError:
        kept.unlink(missing_ok=True)  # perhaps a notice in the file's place: the next run fetches anew
        raise


def _read(path: Path) -> Sequence[object]:
    return _read_parquet(path) if path.suffix == ".parquet" else _read_text(path, str(path))


def _read_parquet(path: Path) -> Sequence[object]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows: list[object] = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} is truncated or no parquet file ({error})") from error
    return rows


def _read_text(path: Path, name: str) -> Sequence[object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text ({error})") from error
    return _array(text, name) if text.lstrip().startswith("[") else _lines(text, name)


def _array(text: str, name: str) -> list[object]:
    try:
        rows: list[object] = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits and too much nesting, too
        raise ConfigError(f"{name}, record {_whole(text) + 1:,}: truncated or damaged JSON ({error})") from error
    return rows


def _whole(text: str) -> int:
    """How many records of a damaged array can be read."""
    decode = json.JSONDecoder().raw_decode
    rest, count = text.lstrip()[1:].lstrip(" \t\r\n"), 0
    position = 0
    while True:
        try:
            _, position = decode(rest, position)
        except (ValueError, RecursionError):
            return count
        count += 1
        while position < len(rest) and rest[position] in ", \t\r\n":
            position += 1


def _lines(text: str, name: str) -> list[object]:
    rows: list[object] = []
    for line in text.split("\n"):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            problem = f"{error}; needed: a JSON array, or one JSON object a line"
            raise ConfigError(f"{name}, record {len(rows) + 1:,}: truncated or damaged ({problem})") from error
    return rows


def _record(source: Source, row: object, file: str, number: int) -> Record:
    record = Record({}, file, number)
    if not isinstance(row, Mapping):
        raise record.error(f"an object with {', '.join(source.fields)} is needed, got {type(row).__name__}")
    for name in source.fields:
        value = row.get(name, row.get(source.aliases.get(name, name)))
        if value is None:
            raise record.error(f"the field {name!r} is missing; there are {', '.join(map(str, row)) or 'none'}")
        record[name] = _text(value, name, record)
    for name in source.optional:
        record[name] = _text(row.get(name) or "", name, record)
    return record


def _text(value: object, name: str, record: Record) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise record.error(f"{name} must be text or a number, got {value!r:.60}")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise record.error(f"{name} is no Unicode text (half a surrogate pair): {value!r:.60}") from None
    return text
