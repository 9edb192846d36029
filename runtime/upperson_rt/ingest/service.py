"""`ingest`: the one path from crops to committed rows.

A picture, or a frame with boxes, becomes crops; crops are embedded in micro-batches; one
transaction adds their rows; then outputs get them. `index`, shards, Ray and cameras differ in where
crops come from and in which threads the steps run, and in nothing else.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.extensions import load_extension
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.crop import Crop
from upperson_rt.ingest.crop_folder import CropFolder

__all__ = ["Ingest", "Output", "open_outputs"]


class Output(Protocol):
    """Gets rows after they were committed, such as to send them elsewhere.

    An extension of ``upperson.outputs`` is a function without arguments that returns one.
    """

    def committed(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take the rows of one transaction, and the keys of those that were there before.

        An error in it ends the run; the rows stay.
        """

    def close(self) -> None:
        """Finish; called once at the end."""


class Ingest:
    """Embeds crops and commits their rows. `embed` and `commit` may run in different threads."""

    def __init__(
        self,
        encoder: Encoder,
        gallery: Gallery,
        batch_size: int = 32,
        outputs: Sequence[Output] = (),
    ) -> None:
        """Ingest into a gallery.

        Args:
            encoder: Whose image tower to use.
            gallery: Opened with the encoder's fingerprint.
            batch_size: Crops that run at a time.
            outputs: Get the committed rows, in this order.
        """
        self.gallery = gallery
        self.folder: CropFolder | None = None
        """Where pictures of crops are saved; None saves none."""
        self.outputs = outputs
        self._encoder = encoder
        self._batch_size = batch_size

    def embed(self, crops: Sequence[Crop]) -> NDArray[np.float32]:
        """Return the (N, D) embeddings of crops.

        Raises:
            BackendError: The image tower cannot be loaded or fails.
            IntegrityError: The image tower gives wrong results.
        """
        pixels = np.stack([crop.pixels for crop in crops])
        return self._encoder.encode_pixels(pixels, self._batch_size)

    def commit(self, crops: Sequence[Crop], embeds_ND: NDArray[np.float32]) -> list[str]:
        """Save the pictures of crops, then add their rows in one transaction.

        Returns:
            The keys that were there before.

        Raises:
            InputError: The gallery or the folder of pictures cannot be written to.
            IntegrityError: The gallery is damaged.
        """
        items = [crop.item for crop in crops]
        with nullcontext() if self.folder is None else self.folder.saved(crops):
            return self.gallery.add(items, embeds_ND, self._encoder.variant)

    def deliver(self, crops: Sequence[Crop], replaced: Sequence[str]) -> None:
        """Give committed rows to the outputs; ``replaced`` is what `commit` returned."""
        items = [crop.item for crop in crops]
        for output in self.outputs:
            output.committed(items, replaced)


def open_outputs(names: Sequence[str]) -> list[Output]:
    """Return the extensions of ``upperson.outputs`` with these names.

    Raises:
        UsageError: There is none of that name.
        BackendError: One cannot be imported.
    """
    return [load_extension("outputs", name)() for name in names]
