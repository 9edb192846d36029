"""What commands open: a model with a gallery, a retriever over both, and its filter."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from upperson_rt.arguments import read_attributes
from upperson_rt.cli.output import backend_line, print_note, print_warning
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_rt.bundle import Bundle
    from upperson_rt.camera import Detector
    from upperson_rt.gallery import Filter, Gallery
    from upperson_rt.retriever import Retriever
    from upperson_rt.towers import Backend, Tower

__all__ = [
    "open_announced",
    "open_retriever",
    "open_store",
    "read_filter",
    "warn_of_unknown_cameras",
]


@contextmanager
def open_store(
    bundle: Path,
    gallery: str,
    tower: "Tower",
    *,
    trust: Path | None,
    variant: str | None,
    backend: str,
    device: str,
    threads: int | None = None,
    create: bool = False,
    allow_distilled: bool = False,
) -> "Iterator[tuple[Bundle, Backend, Gallery]]":
    """Load one tower of a bundle, say on stderr what really runs it, and open its gallery.

    Args:
        bundle: Folder of the bundle.
        gallery: See `Gallery.open`; it is closed at the end.
        tower: The one that the command needs.
        trust: Public key that must have signed the bundle; see `Bundle.open`.
        variant: See `Bundle.open`, as for backend, device and threads.
        backend: See `open_backend`.
        device: See `open_backend`.
        threads: CPU threads.
        create: Make the gallery if it is not there.
        allow_distilled: See `Gallery.open`.
    """
    from upperson_rt.bundle import Bundle
    from upperson_rt.files import remove_leftovers
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.sqlite.database import DATABASE_FILE

    opened = Bundle.open(bundle, variant, backend, device, threads=threads, trust=trust)
    manifest = opened.manifest
    dim = manifest.model.embed_dim
    if create:
        opened.backend(tower)  # No gallery is made for a model that does not run,
        if "://" not in gallery:
            remove_leftovers(Path(gallery, DATABASE_FILE))
    with Gallery.open(
        gallery, manifest.fingerprint, dim, create=create, allow_distilled=allow_distilled
    ) as store:
        running = opened.backend(tower)  # and none is loaded for a gallery that is not there.
        print_note(backend_line(opened, tower))
        yield opened, running, store


@contextmanager
def open_retriever(
    bundle: Path,
    gallery: str,
    tower: "Tower",
    query_log: Path | None,
    *,
    trust: Path | None,
    variant: str | None,
    backend: str,
    device: str,
    threads: int | None = None,
    allow_distilled: bool = False,
) -> "Iterator[tuple[Bundle, Backend, Retriever]]":
    """Open a retriever as `open_store` does, which notes every query in a log."""
    from upperson_rt.query_log import QueryLog
    from upperson_rt.retriever import Retriever

    # The log first: no model is loaded for a query that may not be answered.
    with (
        nullcontext() if query_log is None else QueryLog(query_log) as log,
        open_store(
            bundle,
            gallery,
            tower,
            trust=trust,
            variant=variant,
            backend=backend,
            device=device,
            threads=threads,
            allow_distilled=allow_distilled,
        ) as (opened, running, store),
    ):
        if log is not None and log.problem:
            print_warning(log.problem)
        yield opened, running, Retriever(opened.encoder(), store, log)


def open_announced(
    name: str,
    layout: str | None,
    person: str | None,
    min_score: float | None,
    threads: int | None,
    frames_of: Literal["videos", "pictures"],
) -> "Detector":
    """Open a detector as `open_detector` does, and say on stderr what it is.

    Raises:
        UsageError: Boxes of a video, where there is none.
    """
    from upperson_rt.camera import BoxesFile, OnnxDetector, open_detector

    found = open_detector(name, layout, person, min_score, threads)
    if isinstance(found, BoxesFile) and frames_of == "pictures":
        raise UsageError(f"{name} holds the boxes of one video, not of pictures: name a detector")
    if isinstance(found, OnnxDetector):
        print_note(f"detector: {found}")
    if name == "hog":
        print_warning(
            "hog misses many people and finds some where nobody is: use a network in an ONNX file"
        )
    return found


def read_filter(
    camera: list[str] | None,
    since: float | None,
    until: float | None,
    track: str | None,
    where: list[str] | None,
) -> "Filter":
    """Return the filter of --camera, --since, --until, --track and --where.

    Raises:
        UsageError: They contradict each other, or a pair of --where is malformed.
    """
    from upperson_rt.gallery import Filter

    return Filter(
        camera=camera or None,
        since=since,
        until=until,
        track=track,
        attributes=read_attributes(where, "--where"),
    )


def warn_of_unknown_cameras(store: "Gallery", where: "Filter") -> None:
    """Warn of cameras in a filter that no picture is from."""
    from upperson_rt.gallery import Filter

    unknown = [name for name in where.cameras or () if not store.count(Filter(camera=name))]
    if unknown:
        known = ", ".join(store.cameras()) or "none that has a name"
        for name in unknown:
            print_warning(f"no picture of the camera '{name}'; the gallery's cameras are: {known}")
