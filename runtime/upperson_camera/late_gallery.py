"""A gallery whose server is away when a run starts: it is opened once the server answers."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.printable import get_logger

_log = get_logger(__name__)


class LateGallery:
    """Takes the place of a `Gallery` before a `DiskBuffer`, which needs no more of it than this.

    For one thread at a time.
    """

    has_outbox: ClassVar[bool] = False
    is_remote: ClassVar[bool] = True
    crops_dir: ClassVar[Path | None] = None

    def __init__(
        self, address: str, location: str, fingerprint: str, embed_dim: int, problem: str
    ) -> None:
        """Open nothing yet.

        Args:
            address: For `Gallery.open`; may hold a password.
            location: As `Gallery.location` will be.
            fingerprint: Of the embedding space.
            embed_dim: D, the length of a vector.
            problem: Why it could not be opened.
        """
        self.location, self.fingerprint, self.embed_dim = location, fingerprint, embed_dim
        self.problem = problem
        """Why it could not be opened."""
        self._address = address
        self._opened: Gallery | None = None

    def open(self) -> Gallery:
        """Open it if it is not open.

        Raises:
            BackendError: The server is away, or refuses the user.
            IntegrityError: The collection is no gallery, or one of another model.
        """
        if self._opened is None:
            space = self.fingerprint, self.embed_dim
            self._opened = Gallery.open(self._address, *space, create=True)
        return self._opened

    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> list[str]:
        """As `Gallery.add`; opens it."""
        return self.open().add(items, vectors, variant)

    def count(self, where: Filter | None = None) -> int:
        """As `Gallery.count`; opens it."""
        return self.open().count(where)

    def close(self) -> None:
        """Close it if it was opened."""
        if self._opened is not None:
            self._opened.close()

    def __enter__(self) -> "LateGallery":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_now_or_later(
    location: str | os.PathLike[str], fingerprint: str, embed_dim: int
) -> Gallery:
    """Open a gallery, or make it; while its server is away, return a `LateGallery` and log it.

    Raises:
        UppersonError: As `Gallery.open`, but for the code ``server_away``. A user or password that
            the server refuses is an error, as it is where a `LateGallery` is opened later.
    """
    try:
        return Gallery.open(location, fingerprint, embed_dim, create=True)
    except BackendError as error:
        if error.code != "server_away":
            raise
        shown = str(error.fields.get("location", location))
        late = LateGallery(str(location), shown, fingerprint, embed_dim, str(error))
    text = "gallery %s cannot be opened yet, crops wait on disk until it can: %s"
    _log.warning(text, shown, late.problem, extra={"event": "gallery_away", "waiting": 0})
    return cast(Gallery, late)
