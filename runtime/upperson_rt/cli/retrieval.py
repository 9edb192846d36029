"""What commands that search open: a log, a bundle, a gallery."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from upperson_rt.cli.output import backend_line, print_note

if TYPE_CHECKING:
    from upperson_rt.bundle import Bundle
    from upperson_rt.retriever import Retriever
    from upperson_rt.towers import Backend

__all__ = ["open_retriever", "print_backend"]


@contextmanager
def open_retriever(
    bundle: Path,
    gallery: str,
    query_log: Path | None,
    *,
    variant: str | None,
    backend: str,
    device: str,
    threads: int | None = None,
) -> "Iterator[tuple[Bundle, Retriever]]":
    """Open what the options name; the gallery and the log are closed at the end."""
    from upperson_rt.bundle import Bundle
    from upperson_rt.gallery import Gallery
    from upperson_rt.query_log import QueryLog
    from upperson_rt.retriever import Retriever

    # The log first: no model is loaded for a query that may not be answered.
    with nullcontext() if query_log is None else QueryLog(query_log) as log:
        opened = Bundle.open(bundle, variant, backend, device, threads=threads)
        encoder = opened.encoder()
        with Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim) as store:
            yield opened, Retriever(encoder, store, log)


def print_backend(running: "Backend", asked: str) -> None:
    """Say what the model really runs on."""
    print_note(backend_line(running.name, running.version, running.device, asked))
