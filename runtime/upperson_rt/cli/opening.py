"""What commands open: a bundle, a gallery, a retriever over both, a detector."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from upperson_rt.cli.output import backend_line, print_note, print_warning
from upperson_rt.errors import UsageError

if TYPE_CHECKING:
    from upperson_rt.bundle import Bundle
    from upperson_rt.cli.options import Model, Searched
    from upperson_rt.gallery import Gallery
    from upperson_rt.ingest.detector import Detector
    from upperson_rt.retriever import Retriever
    from upperson_rt.towers import Backend, Tower


@contextmanager
def open_store(
    model: "Model",
    gallery: str,
    tower: "Tower",
    *,
    create: bool = False,
    allow_distilled: bool = False,
    opening: "Callable[[str, str, int], Gallery] | None" = None,
) -> "Iterator[tuple[Bundle, Backend, Gallery]]":
    """Load one tower of a bundle, print the backend that runs it, and open its gallery.

    ``opening`` makes the gallery where there is none, instead of `Gallery.open`, of its location,
    the fingerprint and the number of dimensions.
    """
    from upperson_rt.files import remove_leftovers
    from upperson_rt.gallery import Gallery
    from upperson_rt.gallery.sqlite.database import DATABASE_FILE

    opened = open_model(model)
    manifest = opened.manifest
    dim = manifest.model.embed_dim
    if create or opening is not None:
        opened.backend(tower)  # First: no gallery is made for a model that does not run.
        if "://" not in gallery:
            remove_leftovers(Path(gallery, DATABASE_FILE))
    if opening is not None:
        found = opening(gallery, manifest.fingerprint, dim)
    else:
        found = Gallery.open(
            gallery, manifest.fingerprint, dim, create=create, allow_distilled=allow_distilled
        )
    with found as store:
        running = opened.backend(tower)  # Last: no model is loaded for a missing gallery.
        print_note(backend_line(opened, tower))
        yield opened, running, store


class NewGallery:
    """A gallery that is made before its first row, so that a run without one leaves none."""

    def __init__(self, location: str, fingerprint: str, embed_dim: int) -> None:
        self._space = location, fingerprint, embed_dim
        self.made: Gallery | None = None

    def __call__(self) -> "Gallery":
        """Make the gallery, or open one that another process has made meanwhile."""
        from upperson_rt.gallery import Gallery

        self.made = Gallery.open(*self._space, create=True)
        return self.made


@contextmanager
def open_to_index(
    model: "Model", gallery: str
) -> "Iterator[tuple[Bundle, Backend, Gallery | NewGallery]]":
    """Do what `open_store` does; a folder without a gallery gets one with the first row."""
    from upperson_rt.files import remove_leftovers, require_writable
    from upperson_rt.gallery.sqlite.database import DATABASE_FILE

    file = Path(gallery, DATABASE_FILE)
    if "://" in gallery or file.exists():
        with open_store(model, gallery, "image", create=True) as found:
            yield found
        return
    opened = open_model(model)
    running = opened.backend("image")
    require_writable(file.parent)
    remove_leftovers(file)
    print_note(backend_line(opened, "image"))
    new = NewGallery(gallery, opened.manifest.fingerprint, opened.manifest.model.embed_dim)
    try:
        yield opened, running, new
    finally:
        if new.made is not None:
            new.made.close()


def open_model(model: "Model") -> "Bundle":
    """Open the bundle of a command line."""
    from upperson_rt.bundle import Bundle

    return Bundle.open(
        model.bundle,
        model.variant,
        model.backend,
        model.device,
        threads=model.threads,
        trust=model.trust,
    )


@contextmanager
def open_retriever(
    model: "Model", searched: "Searched", tower: "Tower"
) -> "Iterator[tuple[Bundle, Backend, Retriever]]":
    """Open a retriever as `open_store` does; it logs every query."""
    from upperson_rt.retriever import Retriever
    from upperson_rt.search.query_log import open_query_log

    log_file, allow_distilled = searched.query_log, searched.allow_distilled
    # The log first: a query that cannot be logged is not run.
    with (
        nullcontext() if log_file is None else open_query_log(log_file) as log,
        open_store(model, searched.gallery, tower, allow_distilled=allow_distilled) as found,
    ):
        opened, running, store = found
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
    pixels: str | None = None,
) -> "Detector":
    """Open a detector as `open_detector` does, and describe it on stderr."""
    from upperson_rt.ingest.detector import open_detector

    found: Any = open_detector(name, layout, person, min_score, threads, pixels)
    if getattr(found, "of_one_video", False) and frames_of == "pictures":
        raise UsageError(
            f"{name} holds the boxes of one video, not of pictures: name a detector",
            code="boxes_of_a_video",
            detector=name,
        )
    if hasattr(found, "facts"):
        print_note(f"detector: {found}")
    if (warning := getattr(found, "warning", None)) is not None:
        print_warning(warning)
    detector: Detector = found
    return detector
