"""The encoder: pictures and sentences to embeddings in one space."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_callable, check_list
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import Manifest
from upperson_rt.printable import safe_repr
from upperson_rt.tokenizer import TokenBatch, Tokenizer, token_lengths
from upperson_rt.towers import Backend, Tower, batch_slices, run_tower

if TYPE_CHECKING:  # Loads Pillow, which sentences do without.
    from upperson_rt.preprocess import Channels, ImageSource

Progress: TypeAlias = Callable[[int, int], None]
"""Called as ``progress(done, total)`` after each batch."""


class Encoder:
    """Embeds pictures and sentences; the cosine of two embeddings says how well they match.

    Made by `Bundle.encoder` or ``upperson_rt.open``. A tower is loaded when it is first used.
    Safe to use from several threads: a tower is loaded once, and the others wait for it. Methods
    raise InputError for what cannot be embedded, BackendError if a tower cannot be loaded or fails,
    and IntegrityError if it gives wrong results.
    """

    def __init__(
        self,
        manifest: Manifest,
        variant: str,
        tokenizer: Tokenizer,
        backend: Callable[[Tower], Backend],
    ) -> None:
        self.manifest = manifest
        self.variant = variant
        self.tokenizer = tokenizer
        self.backend = backend

    @property
    def embed_dim(self) -> int:
        """D, the length of an embedding."""
        return self.manifest.model.embed_dim

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space; embeddings compare only within one space."""
        return self.manifest.fingerprint

    def prepare_image(
        self, source: "ImageSource", channels: "Channels" = "rgb"
    ) -> NDArray[np.uint8]:
        """Load and resize a picture for `encode_pixels`: uint8 RGB [H, W, 3] of the model's size.

        Args:
            source: A file, a Pillow image or a uint8 array, of any size.
            channels: ``bgr`` for arrays of OpenCV.
        """
        from upperson_rt.preprocess import prepare_image

        image = self.manifest.image
        return prepare_image(source, image.height_px, image.width_px, channels)

    def encode_images(
        self,
        images: "Sequence[ImageSource] | NDArray[np.uint8]",
        batch_size: int = 32,
        progress: Progress | None = None,
        channels: "Channels" = "rgb",
    ) -> NDArray[np.float32]:
        """Embed pictures.

        Args:
            images: N files, Pillow images or uint8 arrays, mixed and of any size; or one array
                [N, H, W, 3].
            batch_size: Pictures decoded and run at a time.
            progress: Called after each batch.
            channels: Order of the colours in arrays; ``bgr`` for frames of OpenCV. Files and
                Pillow images know theirs.

        Returns:
            (N, D) float32 of unit length, in the order given; (0, D) for no picture.
        """
        _check_list(images)
        if progress is not None:
            check_callable(progress, "progress")
        embeds = np.empty((len(images), self.embed_dim), dtype=np.float32)
        for rows in batch_slices(len(images), batch_size):
            pixels = np.stack([self.prepare_image(image, channels) for image in images[rows]])
            embeds[rows] = self._embed("image", pixels)
            if progress is not None:
                progress(rows.stop, len(images))
        return embeds

    def encode_pixels(self, pixels: NDArray[np.uint8], batch_size: int = 32) -> NDArray[np.float32]:
        """Embed pictures that already have the model's size.

        Args:
            pixels: uint8 RGB [N, H, W, 3].
            batch_size: Pictures run at a time.

        Returns:
            (N, D) float32 of unit length.
        """
        size = (self.manifest.image.height_px, self.manifest.image.width_px, 3)
        if not isinstance(pixels, np.ndarray):
            message = f"expected pixels as an array of numpy, found {safe_repr(pixels)}"
            raise InputError(message, code="pixels_unfit")
        if pixels.dtype != np.uint8 or pixels.shape[1:] != size:
            raise InputError(
                f"expected pixels uint8 (N, {size[0]}, {size[1]}, 3), found {pixels.dtype} "
                f"{pixels.shape}: prepare_image makes them of any picture",
                code="pixels_unfit",
                found=f"{pixels.dtype} {pixels.shape}",
            )
        embeds = np.empty((len(pixels), self.embed_dim), dtype=np.float32)
        for rows in batch_slices(len(pixels), batch_size):
            embeds[rows] = self._embed("image", pixels[rows])
        return embeds

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences.

        Args:
            texts: N sentences. Those longer than the context are cut; `Tokenizer.encode` tells
                which.
            batch_size: Sentences run at a time, sorted by length so that short ones do not pay
                for long ones.

        Returns:
            (N, D) float32 of unit length, in the order given; (0, D) for no sentence.
        """
        texts = check_list(texts, "sentences")
        if not texts:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        return self.encode_tokens(self.tokenizer.encode(texts), batch_size)

    def encode_tokens(self, tokens: TokenBatch, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences that `Tokenizer.encode` has read; as `encode_texts`.

        Returns:
            (N, D) float32 of unit length, in the order of the batch.
        """
        ids = tokens.input_ids
        embeds = np.empty((len(ids), self.embed_dim), dtype=np.float32)
        lengths = token_lengths(ids)
        order = np.argsort(lengths, kind="stable")
        for rows in batch_slices(len(ids), batch_size):
            picked = order[rows]
            embeds[picked] = self._embed("text", ids[picked, : lengths[picked].max()])
        return embeds

    def _embed(self, tower: Tower, inputs: NDArray[np.generic]) -> NDArray[np.float32]:
        embeds = run_tower(self.backend(tower), tower, inputs)
        norms = np.linalg.norm(embeds, axis=1, keepdims=True)
        if embeds.shape != (len(inputs), self.embed_dim) or not _all_usable(norms):
            raise IntegrityError(
                f"the {tower} tower gave embeddings of shape {embeds.shape} with values that "
                f"cannot be used, expected {(len(inputs), self.embed_dim)} and finite: see "
                " upperson-rt doctor",
                code="embeds_unusable",
                tower=tower,
            )
        unit: NDArray[np.float32] = embeds / norms
        return unit


def _check_list(images: object) -> None:
    """Refuse one picture where a list is due: a loop over its rows would embed each of them."""
    if isinstance(images, np.ndarray):
        if images.ndim != 4 and images.dtype != np.object_:
            raise InputError(
                f"expected a list of pictures or an array (N, H, W, 3), found an array "
                f"{images.shape}: put a single picture in a list",
                code="no_picture_list",
            )
    elif isinstance(images, str | bytes) or not isinstance(images, Sequence):
        raise InputError(
            f"expected a list of pictures, found {type(images).__name__}: make it a list",
            code="no_picture_list",
        )


def _all_usable(norms: NDArray[np.float32]) -> bool:
    return bool((np.isfinite(norms) & (norms > 0)).all())
