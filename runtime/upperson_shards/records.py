"""Shards of a list of pictures, one for each machine, and the records that let them be merged.

A hash of its name decides which shard a picture belongs to, so machines need to agree on nothing
but the number of shards. Each machine sees the whole list, takes its part, and records three
tallies: of the list, of its part, and of what it added. Tallies add up in any order.
"""

import json
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import write_atomically
from upperson_rt.ingest.files import SkippedImage
from upperson_rt.printable import count_of, safe_repr, shortened
from upperson_rt.strict import Constraint, Count, Positive, read_fields, read_json, require_version

RECORD_FILE = "shard.json"
"""In the folder of a gallery that is a shard."""
_VERSION = 2
_MOST_SHARDS = 1_000_000
_MOST_SHOWN = 5
_MODULUS = 1 << 128
_Number: TypeAlias = Annotated[
    int, Constraint(lambda value: 0 <= value < 1 << 63, "an integer from 0 to 2^63")
]
_HexDigits: TypeAlias = Annotated[
    str, Constraint(lambda text: bool(re.fullmatch("[0-9a-f]{32}", text)), "32 hex digits")
]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One of several parts."""

    number: int
    """From 1."""
    of: int
    """How many there are."""

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Read ``3/16``."""
        if not cls.is_one(text):
            raise UsageError(
                f"{safe_repr(text)} is no shard: write its number, from 1, and how many there are, "
                f"{_MOST_SHARDS} at most, such as 3/16"
            )
        number, of = map(int, text.split("/"))
        return cls(number=number, of=of)

    @staticmethod
    def is_one(text: str) -> bool:
        """Whether `parse` takes a text."""
        match = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
        return match is not None and 1 <= int(match[1]) <= int(match[2]) <= _MOST_SHARDS

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def holds(self, name: str) -> bool:
        """Whether a picture belongs to it."""
        return self.number_of(name) == self.number

    def number_of(self, name: str) -> int:
        """Return the number of a picture's shard."""
        return _hash(name) % self.of + 1


@dataclass(frozen=True)
class Tally:
    """How many texts, and a sum of their hashes: equal for the same texts, in whatever order."""

    count: _Number = 0
    total: _HexDigits = f"{0:032x}"

    @classmethod
    def of(cls, texts: Iterable[str | bytes]) -> "Tally":
        """Count texts, or bytes."""
        count = total = 0
        for text in texts:
            count += 1
            total += _hash(text)
        return cls(count, f"{total % _MODULUS:032x}")

    def __add__(self, other: "Tally") -> "Tally":
        total = (int(self.total, 16) + int(other.total, 16)) % _MODULUS
        return Tally(self.count + other.count, f"{total:032x}")


def _hash(text: str | bytes) -> int:
    """Return 128 bits that are the same on every machine; names of files need not be text."""
    data = text.encode("utf-8", "surrogateescape") if isinstance(text, str) else text
    return int.from_bytes(blake2b(data, digest_size=16).digest(), "big")


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What indexing a shard writes down about it."""

    shard: Annotated[str, Constraint(Shard.is_one, "a shard such as 3/16")]
    """See `Shard.parse`."""
    fingerprint: str
    """Of the embedding space."""
    whole: Tally
    """Names of the pictures of all shards."""
    own: Tally
    """Names of those of this one."""
    root: str
    """The folder that all pictures lay below on its machine: keys begin with it."""
    made_with: dict[str, str]
    """What changes the rows of a picture, by option; what was left at its default is not there."""
    finished: bool = False
    items: Tally = Tally()
    """Keys that were added."""
    with_items: Count = 0
    """Pictures that gave at least one."""
    empty: Count = 0
    """Pictures in which a detector found no person."""
    skipped: tuple[SkippedImage, ...] = ()
    schema_version: Positive = _VERSION

    @property
    def place(self) -> Shard:
        """Which shard it is."""
        return Shard.parse(self.shard)

    def write(self, file: Path) -> None:
        """Write it, completely or not at all."""
        content = asdict(self)
        text = json.dumps(content | {"checksum": _checksum(content)}, indent=2)
        write_atomically(file, f"{text}\n")

    @classmethod
    def read(cls, file: Path) -> "ShardRecord":
        """Read what `write` wrote."""
        content = read_json(file)
        require_version(content, str(file), [_VERSION], "index the shard again into a new folder")
        given = content.pop("checksum", None)
        if given != _checksum(content):
            raise IntegrityError(
                f"{file} was altered: restore it from a copy, or index the shard into a new folder"
            )
        return read_fields(cls, content, str(file))


def check_whole(folders: Sequence[Path], records: Sequence[ShardRecord]) -> None:
    """Check that the records of some folders are all parts of one list, each once."""
    first = records[0]
    places: dict[int, Path] = {}
    for folder, record in zip(folders, records, strict=True):
        if record.fingerprint != first.fingerprint:
            raise IntegrityError(
                f"shards of two models: {folders[0]} is of {shortened(first.fingerprint)}, "
                f"{folder} of {shortened(record.fingerprint)}; index all of them with one bundle"
            )
        if record.place.of != first.place.of:
            raise InputError(
                f"shards of two divisions: {folders[0]} is {first.shard}, {folder} {record.shard}"
            )
        if record.whole != first.whole:
            raise InputError(
                f"shards of two lists: {folders[0]} is of {first.whole.count} pictures, {folder} "
                f"of {record.whole.count}, or others: index them again from the same pictures"
            )
        if record.made_with != first.made_with:
            one, other = options_apart(first, record)
            raise InputError(
                f"shards made with other options: {folders[0]} with {one}, {folder} with {other}; "
                "index all of them with the same"
            )
        if record.place.number in places:
            raise InputError(
                f"shard {record.shard} is there twice, in {places[record.place.number]} and "
                f"{folder}: name one of them"
            )
        places[record.place.number] = folder
        if record.own.count != record.with_items + record.empty + len(record.skipped):
            raise IntegrityError(
                f"shard {record.shard} in {folder} does not account for its {record.own.count} "
                "pictures: index it again"
            )
    if missing := [n for n in range(1, first.place.of + 1) if n not in places]:
        named = ", ".join(f"{n}/{first.place.of}" for n in missing[:_MOST_SHOWN])
        more = f" and {len(missing) - _MOST_SHOWN} more" if len(missing) > _MOST_SHOWN else ""
        raise InputError(
            f"{len(missing)} of {count_of(first.place.of, 'shard')} "
            f"{'is' if len(missing) == 1 else 'are'} missing: {named}{more}; index what is not "
            "there yet, and name the folders of all"
        )
    if (found := sum((record.own for record in records), Tally())) != first.whole:
        raise IntegrityError(
            f"the shards are not the parts of one list: it has {first.whole.count} pictures, they "
            f"have {found.count}, or others: index them again from the same pictures"
        )


def options_apart(*records: ShardRecord) -> list[str]:
    """Return for each of two records the options that the other has not, to be shown."""
    names = {name for record in records for name in record.made_with}
    apart = sorted(name for name in names if len({r.made_with.get(name) for r in records}) > 1)
    return [
        ", ".join(
            f"{name} {shortened(record.made_with[name])}" if name in record.made_with
            else f"no {name}"
            for name in apart
        )
        for record in records
    ]  # fmt: skip


def _checksum(content: dict[str, Any]) -> str:
    # Names of files that are no text come back from JSON as they were.
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode('ascii')):08x}"
