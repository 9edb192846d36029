"""`ingest`: the one path from crops to committed rows.

A picture, or a frame with boxes, becomes crops; crops are embedded in micro-batches; one
transaction adds their rows; then outputs get them. `index`, shards, Ray and cameras differ in where
crops come from and in which threads the steps run, and in nothing else.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, UppersonError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.protocol import Within
from upperson_rt.ingest.detector import plugin_boundary
from upperson_rt.printable import error_text, safe_repr


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A picture of one person, ready for the image tower."""

    item: Item
    pixels: NDArray[np.uint8]
    """RGB [H, W, 3] of the model's size, see `Encoder.prepare_image`."""
    jpeg: bytes | None = None
    """The picture to save as ``item.crop``, or None."""


class Output(Protocol):
    """Gets rows after they were committed; an extension of ``upperson.outputs`` makes one."""

    def committed(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take the rows of one transaction and the keys that were there before.

        An error ends the run.
        """

    def close(self) -> None:
        """Finish; called once at the end."""


class Matcher(Protocol):
    """Compares rows with standing queries; an extension of ``upperson.matchers`` makes one.

    If the extension has a static ``copy(galleries, merged)``, merged shards keep their queries; it
    returns how many they are.
    """

    def match(self, items: Sequence[Item], embeds_ND: NDArray[np.float32]) -> Within | None:
        """Take rows that are about to be committed; return what to write with them, if anything.

        An error ends the run.
        """


def embed_crops(encoder: Encoder, crops: Sequence[Crop], batch_size: int) -> NDArray[np.float32]:
    """Return the (N, D) embeddings of crops."""
    return encoder.encode_pixels(np.stack([crop.pixels for crop in crops]), batch_size)


class Ingest:
    """Embeds crops and commits their rows. `embed` and `commit` may run in different threads."""

    def __init__(
        self,
        encoder: Encoder,
        gallery: Gallery,
        batch_size: int = 32,
        outputs: Sequence[Output] = (),
    ) -> None:
        self.gallery = gallery
        self.saving: Callable[[Sequence[Crop]], AbstractContextManager[object]] = nullcontext
        """Saves pictures of crops before the rows are added; what it saved goes on an error."""
        self.outputs = outputs
        self._encoder = encoder
        self._batch_size = batch_size
        self._matchers = _open_matchers(encoder, gallery)

    def embed(self, crops: Sequence[Crop]) -> NDArray[np.float32]:
        """Return the (N, D) embeddings of crops."""
        return embed_crops(self._encoder, crops, self._batch_size)

    def commit(self, crops: Sequence[Crop], embeds_ND: NDArray[np.float32]) -> list[str]:
        """Save pictures of crops, then add their rows; return the replaced keys."""
        items = [crop.item for crop in crops]
        with self.saving(crops):
            found = [matcher.match(items, embeds_ND) for matcher in self._matchers]
            within = [one for one in found if one is not None]
            if not within:
                return self.gallery.add(items, embeds_ND, self._encoder.variant)

            def write(outbox: Any, ids: Mapping[str, int], replaced: Sequence[str]) -> None:
                for one in within:
                    one(outbox, ids, replaced)

            return self.gallery.add(items, embeds_ND, self._encoder.variant, write)

    def deliver(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Give committed rows to the outputs; ``replaced`` is what `commit` returned."""
        for output in self.outputs:
            output.committed(items, replaced)


def _open_matchers(encoder: Encoder, gallery: Gallery) -> list[Matcher]:
    """Return what the extensions of ``upperson.matchers`` make; none without an outbox."""
    if not getattr(gallery, "has_outbox", False):  # A program's own gallery may be any object.
        return []
    return [
        load_extension("matchers", name)(encoder, gallery) for name in extension_names("matchers")
    ]


def open_outputs(names: Sequence[str]) -> list[Output]:
    """Return the extensions of ``upperson.outputs`` with these names; the caller closes them.

    Raises:
        UsageError: There is none of that name.
        BackendError: One cannot be imported, or cannot be opened.
    """
    opened: list[Output] = []
    try:
        for name in names:
            make = load_extension("outputs", name)
            with plugin_boundary(partial(_not_opened, name)):
                opened.append(make())
    except BaseException:
        for output in opened:
            output.close()
        raise
    return opened


def _not_opened(name: str, error: BaseException) -> UppersonError:
    if isinstance(error, UppersonError):
        return error
    return BackendError(f"the output {safe_repr(name)} cannot be opened: {error_text(error)}")
