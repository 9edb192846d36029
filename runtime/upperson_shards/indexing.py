"""One shard of a set of pictures into a gallery, with a record of what it should hold."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from upperson_rt.arguments import check_list, check_path
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.files import IndexReport, index_images
from upperson_rt.ingest.service import Output
from upperson_rt.preprocess import iter_named_images
from upperson_rt.printable import safe_repr, shortened
from upperson_shards.records import RECORD_FILE, Shard, ShardRecord, Tally, options_apart

_IN_ROWS = {
    "camera": "--camera",
    "time_from": "--time-from",
    "track_from": "--track-from",
    "attributes": "--attribute",
    "detector": "--detector",
}
"""Options of `index_images` that change the rows of a picture."""


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The pictures of a shard, and tallies of names: of all shards together and of this one."""

    shard: Shard
    files: list[Path]
    whole: Tally
    own: Tally
    root: str
    """See `root_of`."""


def choose_files(
    paths: Iterable[str | os.PathLike[str]], shard: Shard, others: Counter[str] | None = None
) -> ShardFiles:
    """Look at all pictures and choose those of a shard; count ``others`` as `iter_image_files`."""
    paths = check_list(paths, "paths")
    files: list[Path] = []
    names: list[str] = []

    def every_name() -> Iterator[str]:
        for name, file in iter_named_images(paths, others):
            yield name
            if shard.holds(name):
                names.append(name)
                files.append(file)

    whole = Tally.of(every_name())
    return ShardFiles(
        shard=shard, files=files, whole=whole, own=Tally.of(names), root=root_of(paths)
    )


def root_of(paths: Sequence[str | os.PathLike[str]]) -> str:
    """Return the folder that all pictures lie below, as their keys begin."""
    given = [Path(check_path(path, "a picture")).absolute() for path in paths]
    if not given:
        raise InputError("there is no picture to index: name files or folders")
    return os.path.commonpath([path if path.is_dir() else path.parent for path in given])


def made_with(options: Mapping[str, Any]) -> dict[str, str]:
    """Return which options of `index_images` change the rows of a picture, as they are shown."""
    usual = signature(index_images).parameters
    given = {name: options.get(name) or usual[name].default for name in _IN_ROWS}
    return {
        option: _as_text(given[name])
        for name, option in _IN_ROWS.items()
        if given[name] != usual[name].default
    }


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return " ".join(sorted(f"{key}={safe_repr(one)}" for key, one in value.items()))
    # A detector: what its boxes depend on, else what it is called.
    identity = getattr(value, "identity", None)
    kind = value if hasattr(value, "__qualname__") else type(value)
    return identity if isinstance(identity, str) else f"{kind.__module__}.{kind.__qualname__}"


def record_of(location: str) -> Path | None:
    """Return where the record of a gallery lies; None for one that is no folder."""
    return None if "://" in location else Path(location, RECORD_FILE)


def index_shard(
    encoder: Encoder,
    gallery: Gallery,
    chosen: ShardFiles,
    record_file: Path | None,
    *,
    outputs: Sequence[Output] = (),
    **options: Any,
) -> tuple[IndexReport, ShardRecord]:
    """Index the pictures of a shard as `index_images` does, and write its record, unfinished first.

    The gallery is a shard's own, or one that all share. Doing it again replaces what is there.
    """
    record = ShardRecord(
        shard=str(chosen.shard),
        fingerprint=encoder.fingerprint,
        whole=chosen.whole,
        own=chosen.own,
        root=chosen.root,
        made_with=made_with(options),
    )
    if record_file is not None:
        _require_same(gallery, record_file, record)
        record.write(record_file)
    keys = _Keys()
    report = index_images(encoder, gallery, chosen.files, outputs=(keys, *outputs), **options)
    record = replace(
        record,
        finished=True,
        items=keys.tally,
        with_items=report.with_items,
        empty=report.empty,
        skipped=tuple(report.skipped),
    )
    if record_file is not None:
        record.write(record_file)
    return report, record


class _Keys:
    """Tallies the keys of committed rows."""

    tally = Tally()

    def committed(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        self.tally += Tally.of(item.key for item in items)

    def close(self) -> None: ...


def _require_same(gallery: Gallery, file: Path, record: ShardRecord) -> None:
    is_own = record_of(gallery.location) == file
    if file.exists():
        found = ShardRecord.read(file)
        if found.shard != record.shard:
            raise InputError(
                f"gallery {gallery.location} is shard {found.shard}, not {record.shard}: index "
                "each shard into a gallery of its own"
            )
        if found.finished or gallery.count():
            where = f"gallery {gallery.location}" if is_own else str(file)
            require_same_rows(where, found, record)
    elif is_own and gallery.count():
        raise InputError(
            f"gallery {gallery.location} holds pictures already and is no shard: index shard "
            f"{record.shard} into another one with  --gallery"
        )


def require_same_rows(where: str, found: ShardRecord, wanted: ShardRecord) -> None:
    """Refuse pictures whose rows would not take the place of those that a shard has."""
    # More folders beside those of before have a root above theirs, and keys stay as they were.
    if Path(wanted.root) not in (Path(found.root), *Path(found.root).parents):
        raise InputError(
            f"{where} has shard {found.shard} of the pictures in {shortened(found.root)}, not in "
            f"{wanted.root}: keys are paths, so it would hold the rows of both; name the same "
            "pictures as they were named then, for which a link is enough, or choose a new place"
        )
    if found.made_with != wanted.made_with:
        before, now = options_apart(found, wanted)
        raise InputError(
            f"{where} has shard {found.shard} made with {before}, now it is {now}: give the same "
            "options, or choose a new place"
        )
