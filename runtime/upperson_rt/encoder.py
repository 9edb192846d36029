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
    from upperson_rt.preprocess import Channels, ImageSource, PixelArray
    from upperson_rt.score_calibration import ScoreCalibration

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
        calibration: "ScoreCalibration | None" = None,
    ) -> None:
        self.manifest = manifest
        self.variant = variant
        self.tokenizer = tokenizer
        self.backend = backend
        self.calibration = calibration
        """What the bundle ships; None if it has none."""

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

        ``channels`` are ``bgr`` for arrays of OpenCV.
        """
        from upperson_rt.preprocess import prepare_image

        image = self.manifest.image
        return prepare_image(source, image.height_px, image.width_px, channels)

    def encode_images(
        self,
        images: "Sequence[ImageSource] | PixelArray",
        batch_size: int = 32,
        progress: Progress | None = None,
        channels: "Channels" = "rgb",
    ) -> NDArray[np.float32]:
        """Embed pictures: (N, D) float32 of unit length, in the order given.

        Args:
            images: N files, Pillow images or uint8 arrays, mixed and of any size; or one array
                [N, H, W, 3].
            batch_size: Pictures decoded and run at a time.
            progress: Called after each batch.
            channels: Order of the colours in arrays; ``bgr`` for frames of OpenCV. Files and
                Pillow images know theirs.
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

    def encode_pixels(self, pixels: "PixelArray", batch_size: int = 32) -> NDArray[np.float32]:
        """Embed pictures uint8 RGB [N, H, W, 3] of the model's size: (N, D) of unit length."""
        size = (self.manifest.image.height_px, self.manifest.image.width_px, 3)
        if not isinstance(pixels, np.ndarray):
            message = f"expected pixels as an array of numpy, found {safe_repr(pixels)}"
            raise InputError(message, code="pixels_unfit")
        if pixels.dtype != np.uint8 or pixels.shape[1:] != size:
            found = f"{pixels.dtype} {pixels.shape}"
            message = f"expected pixels uint8 (N, {size[0]}, {size[1]}, 3), found {found}"
            message += ": prepare_image makes them of any picture"
            raise InputError(message, code="pixels_unfit", found=found)
        embeds = np.empty((len(pixels), self.embed_dim), dtype=np.float32)
        for rows in batch_slices(len(pixels), batch_size):
            embeds[rows] = self._embed("image", pixels[rows])
        return embeds

    def encode_texts(self, texts: Sequence[str], batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences: (N, D) float32 of unit length, in the order given.

        Those longer than the context are cut; `Tokenizer.encode` returns which. A batch has
        sentences of similar length, so that short ones do not pay for long ones.
        """
        texts = check_list(texts, "sentences")
        if not texts:
            return np.empty((0, self.embed_dim), dtype=np.float32)
        return self.encode_tokens(self.tokenizer.encode(texts), batch_size)

    def encode_tokens(self, tokens: TokenBatch, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences that `Tokenizer.encode` has read; as `encode_texts`."""
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
        expected = len(inputs), self.embed_dim
        if embeds.shape != expected or not (np.isfinite(norms) & (norms > 0)).all():
            message = f"the {tower} tower gave embeddings of shape {embeds.shape} with values that"
            message += f" cannot be used, expected {expected} and finite: see  upperson-rt doctor"
            raise IntegrityError(message, code="embeds_unusable", tower=tower)
        unit: NDArray[np.float32] = embeds / norms
        return unit


def _check_list(images: object) -> None:
    """Refuse one picture where a list is due: a loop over its rows would embed each of them."""
    found = type(images).__name__
    if isinstance(images, np.ndarray):
        if images.ndim == 4 or images.dtype == np.object_:
            return
        found = f"an array {images.shape}"
    elif isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return
    message = f"expected a list of pictures or an array (N, H, W, 3), found {found}"
    raise InputError(f"{message}: put a single picture in a list", code="no_picture_list")
