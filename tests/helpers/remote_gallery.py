"""A gallery that behaves like one on a server which can be away, over one in a folder."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery import Gallery, Item


class RemoteGallery:
    """Passes everything on while its server is there, and notes what was added, in order."""

    has_outbox = False
    is_remote = True
    crops_dir = None

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self.away: Callable[[], object] | None = None
        """Is called instead of the server, such as `refuse`."""
        self.loses_answer = False
        """Whether rows are added and the caller then gets an error."""
        self.attempts = 0
        self.added: list[Item] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._gallery, name)

    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> list[str]:
        self._ask()
        replaced = self._gallery.add(items, vectors, variant)
        if self.loses_answer:
            refuse()
        self.added += items
        return replaced

    def count(self, where: Any = None) -> int:
        self._ask()
        return self._gallery.count(where)

    def _ask(self) -> None:
        self.attempts += 1
        if self.away is not None:
            self.away()


def refuse() -> None:
    """Fail as a server does that is not there."""
    raise BackendError("Milvus failed: failed to connect to all addresses", code="server_failed")
