"""Indexing millions of pictures on a cluster of Ray, shard by shard.

The driver lists the pictures once and writes a list for each shard. Ray Data hands the shards to
actors with one encoder each, which index them as ``upperson-rt index --shard`` does. If a worker
dies, Ray gives its shard to another one. Finished shards are kept, also for later runs.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from upperson_rt.arguments import check_count, check_list
from upperson_rt.bundle import open_encoder
from upperson_rt.errors import BackendError, InputError, UppersonError, missing_extra
from upperson_rt.files import all_names, make_folder, new_folder
from upperson_rt.gallery import Gallery
from upperson_rt.preprocess import iter_named_images
from upperson_rt.printable import error_text, get_logger
from upperson_shards.indexing import ShardFiles, index_shard, made_with, require_same_rows, root_of
from upperson_shards.records import RECORD_FILE, Shard, ShardRecord, Tally, check_whole

_LOG = get_logger(__name__)

_LISTS = "lists"
_NAMES_IN_MEMORY = 1_000_000
_MOST_FAILURES_SHOWN = 3
_RETRIES = 5
"""How often a shard whose worker died is tried again."""
_THE_SAME = ("fingerprint", "whole", "own")


@dataclass(frozen=True, kw_only=True)
class ShardsDone:
    """The result of `index_on_ray`: all parts of one list, each once."""

    folders: Sequence[Path]
    """The shards' galleries, for `merge_shards`; their records, if they share a gallery."""
    earlier: int
    """Shards that earlier runs finished."""
    pictures: int
    """Length of the list: the sum of the next three."""
    with_items: int
    empty: int
    skipped: int
    items: Tally
    """Tally of the keys that were added."""


def index_on_ray(
    bundle: str | os.PathLike[str],
    paths: Iterable[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    shards: int,
    workers: int = 1,
    gallery: str | None = None,
    cpus: float = 1.0,
    gpus: float = 0.0,
    encoder: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> ShardsDone:
    """Index pictures on a cluster of Ray; without one, Ray starts on this machine.

    Run it again after an interruption: finished shards are kept.

    Args:
        bundle: Like the pictures, at the same path on every machine of the cluster.
        paths: Pictures and folders, see `iter_named_images`.
        output: A folder that all machines share. It gets a list of names and, for each shard, a
            gallery, ``shard-3-of-16``, or its record if they share a gallery.
        shards: Number of shards; one should take minutes, since it is repeated as a whole.
        workers: Number of actors, each with its own encoder.
        gallery: Address of a gallery that all shards share; None for a gallery each.
        cpus: CPUs that Ray reserves for an actor.
        gpus: GPUs that Ray reserves for an actor.
        encoder: Options of `open_encoder`, such as ``{"variant": "int8", "threads": 4}``.
        progress: Called with the number of finished shards, and of all.
        options: Of `index_images`, such as ``camera``.

    Raises:
        UsageError: shards or workers is below 1.
        InputError: A path cannot be read, or the output holds shards of other pictures, another
            model or other options.
        BackendError: Ray is not installed, or a shard could not be finished.
        IntegrityError: The shards are not the parts of one list.
    """
    shards, workers = check_count(shards, "shards"), check_count(workers, "workers")
    if gallery is not None and "://" not in gallery:
        raise InputError(
            f"shards cannot share a gallery in a folder, such as {gallery}: leave it out",
            code="gallery_not_shared",
            gallery=gallery,
        )
    try:
        import_module("ray.data")
    except ImportError as error:
        raise missing_extra("ray", "ray", "indexing on a cluster of Ray") from error
    output = Path(output).absolute()
    fingerprint = open_encoder(bundle, **(encoder or {})).fingerprint
    paths = check_list(paths, "paths")
    root = root_of(paths)
    whole, parts = _write_lists(paths, output / _LISTS, shards)
    places = [output / _name(Shard(number=n + 1, of=shards)) for n in range(shards)]
    wanted = [
        ShardRecord(
            shard=f"{number}/{shards}",
            fingerprint=fingerprint,
            whole=whole,
            own=own,
            root=root,
            made_with=made_with(options),
        )
        for number, own in enumerate(parts, 1)
    ]
    known = [_finished(_record_file(place, gallery), record)
             for place, record in zip(places, wanted, strict=True)]  # fmt: skip
    left = [number for number, record in enumerate(known, 1) if record is None]
    worker = {
        "bundle": str(Path(bundle).absolute()),
        "encoder": dict(encoder or {}),
        "output": output,
        "shards": shards,
        "whole": whole,
        "root": root,
        "gallery": gallery,
        "options": options,
    }
    failures: list[str] = []
    for done, (number, problem) in enumerate(_run(left, worker, workers, cpus, gpus), 1):
        if problem:
            failures.append(f"shard {number}/{shards}: {problem}")
        if progress is not None:
            progress(shards - len(left) + done, shards)
    if failures:
        more = "; ..." if len(failures) > _MOST_FAILURES_SHOWN else ""
        raise BackendError(
            f"{len(failures)} of {shards} shards were not finished "
            f"({'; '.join(failures[:_MOST_FAILURES_SHOWN])}{more}): fix that and run it again, "
            "finished shards are kept",
            code="shards_failed",
            failed=len(failures),
            shards=shards,
        )
    records = [ShardRecord.read(_record_file(place, gallery)) for place in places]
    check_whole(places, records)
    return ShardsDone(
        folders=places,
        earlier=shards - len(left),
        pictures=whole.count,
        with_items=sum(record.with_items for record in records),
        empty=sum(record.empty for record in records),
        skipped=sum(len(record.skipped) for record in records),
        items=sum((record.items for record in records), Tally()),
    )


def _run(
    numbers: Sequence[int], worker: Mapping[str, Any], workers: int, cpus: float, gpus: float
) -> Iterable[tuple[int, str]]:
    """Yield the number of each shard, and why it failed, or ""."""
    if not numbers:
        return
    # Ray sends usage statistics by default.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    data: Any = import_module("ray.data")
    found = data.from_items(
        [{"shard": number} for number in numbers], override_num_blocks=len(numbers)
    ).map_batches(
        _Worker,
        fn_constructor_kwargs=dict(worker),
        batch_size=1,
        compute=data.ActorPoolStrategy(size=min(workers, len(numbers))),
        num_cpus=cpus,
        num_gpus=gpus or None,
        max_task_retries=_RETRIES,
    )
    errors: Any = import_module("ray.exceptions")
    try:
        for row in found.iter_rows():
            yield int(row["shard"]), str(row["problem"])
    except errors.RayError as error:
        raise BackendError(
            f"Ray failed ({error_text(error)}): run it again, finished shards are kept",
            code="ray_failed",
        ) from error


@dataclass
class _Worker:
    """An actor with one encoder; indexes a shard at a time."""

    bundle: str
    encoder: Mapping[str, Any]
    output: Path
    shards: int
    whole: Tally
    root: str
    gallery: str | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._encoder = open_encoder(self.bundle, **self.encoder)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        numbers = [int(number) for number in batch["shard"]]
        return {"shard": numbers, "problem": [self._problem(number) for number in numbers]}

    def _problem(self, number: int) -> str:
        """Index a shard; return why it failed, so that the others go on."""
        try:
            self._index(Shard(number=number, of=self.shards))
        except UppersonError as error:
            _LOG.error("shard %d/%d: %s", number, self.shards, error)
            return str(error)
        return ""

    def _index(self, shard: Shard) -> None:
        names, files = _read_list(self.output / _LISTS / _name(shard))
        chosen = ShardFiles(
            shard=shard, files=files, whole=self.whole, own=Tally.of(names), root=self.root
        )
        place = self.output / _name(shard)
        space = self._encoder.fingerprint, self._encoder.embed_dim
        if self.gallery is not None:
            with Gallery.open(self.gallery, *space, create=True) as store:
                record = _record_file(place, self.gallery)
                index_shard(self._encoder, store, chosen, record, **self.options)
            return
        # SQLite needs a local disk; the output may be a network share.
        with tempfile.TemporaryDirectory() as name:
            local = Path(name) / "gallery"
            with Gallery.open(local, *space, create=True) as store:
                index_shard(self._encoder, store, chosen, local / RECORD_FILE, **self.options)
            with new_folder(place, _unowned) as temporary:
                shutil.copytree(local, temporary, dirs_exist_ok=True)


def _unowned(folder: Path) -> set[str]:
    names = set(all_names(folder))
    return set() if RECORD_FILE in names else names


def _name(shard: Shard) -> str:
    return f"shard-{shard.number}-of-{shard.of}"


def _record_file(place: Path, gallery: str | None) -> Path:
    return place / RECORD_FILE if gallery is None else place.with_name(f"{place.name}.json")


def _finished(file: Path, wanted: ShardRecord) -> ShardRecord | None:
    """Return the record of a shard that an earlier run finished, or None."""
    if not file.exists():
        return None
    found = ShardRecord.read(file)
    if any(getattr(found, name) != getattr(wanted, name) for name in _THE_SAME):
        raise InputError(
            f"{file} is of {found.whole.count} pictures and model {found.fingerprint}, now there "
            f"are {wanted.whole.count}, or others, and model {wanted.fingerprint}: choose another "
            "output",
            code="shard_of_other_pictures",
            path=file,
        )
    if not found.finished:
        return None
    require_same_rows(str(file), found, wanted)
    return found


def _write_lists(
    paths: Iterable[str | os.PathLike[str]], folder: Path, shards: int
) -> tuple[Tally, list[Tally]]:
    """Write names and paths of each shard's pictures; return tallies of all and of each."""
    waiting: dict[int, list[tuple[str, Path]]] = {}
    parts = [Tally()] * shards
    divide = Shard(number=1, of=shards)

    def flush(temporary: Path) -> None:
        for number, pairs in waiting.items():
            parts[number - 1] += Tally.of(name for name, _ in pairs)
            texts = (os.fsencode(text) for name, path in pairs for text in (name, path.absolute()))
            with open(temporary / _name(Shard(number=number, of=shards)), "ab") as file:
                file.write(b"".join(text + b"\0" for text in texts))
        waiting.clear()

    make_folder(folder.parent)
    count = 0
    with new_folder(folder, lambda there: {n for n in all_names(there) if "-of-" not in n}) as new:
        for count, (name, path) in enumerate(iter_named_images(paths), 1):
            waiting.setdefault(divide.number_of(name), []).append((name, path))
            if count % _NAMES_IN_MEMORY == 0:
                flush(new)
        flush(new)
    return sum(parts, Tally()), parts


def _read_list(file: Path) -> tuple[list[str], list[Path]]:
    if not file.exists():  # An empty shard.
        return [], []
    texts = [os.fsdecode(text) for text in file.read_bytes().split(b"\0")[:-1]]
    return texts[::2], [Path(text) for text in texts[1::2]]
