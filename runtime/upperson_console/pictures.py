"""Pictures for browsers and query pictures: decoded within limits, scaled down, a plain JPEG.

No request names a path: the item of the gallery names its file, and a file that does not decode is
not sent. Only an export (see `evidence`) sends files byte for byte, so that hashes match.
"""

import hashlib
import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from upperson_console.blur import Box, pixelated
from upperson_console.clip_blur import KnownBoxes, blurred_clip
from upperson_console.limits import RequestQueue
from upperson_console.problems import missing
from upperson_console.user_state import QueryPicture, UserState
from upperson_rt.encoder import Encoder, Progress
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.gallery.clips import ClipFile, clips_of
from upperson_rt.gallery.crops import picture_file, read_crop, use_picture
from upperson_rt.preprocess import image_suffixes, use_image, use_scaled_image
from upperson_rt.tokenizer import TokenBatch
from upperson_rt.towers import batch_slices

if TYPE_CHECKING:
    from upperson_rt.preprocess import Channels, ImageSource, PixelArray

Size: TypeAlias = Literal["thumb", "view", "frame"]
"""``thumb`` for a card, ``view`` for a person's page, ``frame`` for the frame of a crop."""

_Jpeg: TypeAlias = tuple[bytes, tuple[int, int]]
"""A picture, and width and height of its file in pixels."""
_BOUNDS: dict[Size, tuple[int, int]] = {
    "thumb": (256, 384),
    "view": (960, 1200),
    "frame": (1600, 1200),
}
_CACHE_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
"""Bytes of a file that are read at a time."""
_QUALITY = 85
_SENTENCES_AT_ONCE = 4
"""Of one request, before the queue serves another client."""
_MOST_BLURRING = 4
"""Waiting clips."""
_MOST_DECODING = 4
"""Waiting query pictures. With the encoder's queue they are fewer than the server's threads."""


@dataclass(frozen=True)
class Upload:
    """A decoded query picture."""

    pixels: NDArray[np.uint8]
    """uint8 RGB [H, W, 3], scaled down if it was large."""
    sha256: str
    """Of the file that was sent."""
    size: tuple[int, int]
    """Width and height of ``pixels``."""


def as_jpeg(
    pixels: NDArray[np.uint8],
    size: Size,
    hide: Callable[[Image.Image, tuple[int, int]], Image.Image] | None = None,
) -> _Jpeg:
    """Return a picture as JPEG, scaled down to a size, and its width and height before.

    ``hide`` changes the small picture; it also gets the former size.
    """
    whole = pixels.shape[1], pixels.shape[0]
    image = Image.fromarray(pixels)
    image.thumbnail(_BOUNDS[size])
    if hide is not None:
        image = hide(image, whole)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), whole


def read_upload(content: IO[bytes]) -> Upload:
    """Decode a picture file, which is read in pieces."""

    def small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels)
        image.thumbnail(_BOUNDS["view"])
        return np.asarray(image).copy()

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="upperson-") as folder:
        file = Path(folder, "picture")
        with file.open("wb") as written:
            while piece := content.read(PIECE_BYTES):
                digest.update(piece)
                written.write(piece)
        try:
            pixels = use_image(file, small)
        except InputError as error:
            raise _without_path(error, file) from error
    size = pixels.shape[1], pixels.shape[0]
    return Upload(pixels, digest.hexdigest(), size)


def _without_path(error: InputError, file: Path) -> InputError:
    return InputError(str(error).replace(f"image {file}", "the picture"), code=error.code)


class GalleryPictures:
    """Pictures of a gallery's items, with a cache. Safe for several threads."""

    def __init__(self, crops_dir: Path | None) -> None:
        self._crops_dir = crops_dir
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[object, ...], _Jpeg] = OrderedDict()
        self._blurring = RequestQueue(waiting=_MOST_BLURRING)
        self.kept_bytes = 0
        """Bytes of the cached pictures and clips."""

    def file(self, item: Item) -> Path | None:
        """Return the file of an item's picture, or None."""
        return picture_file(item, self._crops_dir)

    def is_cut(self, item: Item) -> bool:
        """Return whether an item's picture is a part of its `file`."""
        own = Item(key=item.key, crop=item.crop)
        return item.box is not None and picture_file(own, self._crops_dir) is None

    def clip(self, item: Item) -> ClipFile | None:
        """Return the clip around an item, or None."""
        return next((one for one in self._beside(item) if one.is_clip), None)

    def saved_frame(self, item: Item) -> ClipFile | None:
        """Return the whole frame that was saved beside an item's picture, or None."""
        return next((one for one in self._beside(item) if not one.is_clip), None)

    def _beside(self, item: Item) -> list[ClipFile]:
        if item.crop is None or self._crops_dir is None:
            return []
        return clips_of(self._crops_dir, item.crop)

    def frame(self, item: Item) -> Path | None:
        """Return the file of the frame that an item was cut from, or None."""
        if item.box is None:
            return None
        if (saved := self.saved_frame(item)) is not None:
            return saved.path
        if item.source is None:
            return None
        file = picture_file(Item(key=item.key, source=item.source), None)
        is_picture = file is not None and file.suffix.lower() in image_suffixes()
        return file if is_picture else None

    def jpeg(self, item: Item, size: Size, blurred: bool = False) -> _Jpeg | None:
        """Return an item's picture as JPEG, and the size of its file in pixels, or None.

        Of a ``blurred`` frame only the item's box can be recognised. Of a box that lies outside of
        its picture, or whose place in it is unknown, there is no picture.
        """
        file = self.frame(item) if size == "frame" else self.file(item)
        if file is None:
            return None
        try:
            found = file.stat()
        except OSError:  # It was deleted meanwhile.
            return None
        box = item.box if size == "frame" or self.is_cut(item) else None
        key = str(file), found.st_mtime_ns, found.st_size, size, box, blurred
        if (kept := self._cached(key)) is not None:
            return kept
        try:
            if size != "frame":
                cut = use_scaled_image(file, _cut(box, size), read_crop(file))
                if cut is None:
                    return None
                made = cut
            elif blurred:
                made = blurred_jpeg(file, box)
            else:
                made = use_picture(file, lambda pixels: as_jpeg(pixels, size))
        except InputError as error:
            raise _without_path(error, file) from error
        return self._cache(key, made)

    def blurred_clip(self, clip: ClipFile, known: KnownBoxes, until: float) -> bytes:
        """Return a clip in which only one person can be recognised, see `clip_blur`.

        One is made at a time; further ones wait, or raise BusyError.
        """
        try:
            found = clip.path.stat()
        except OSError as error:  # It was deleted meanwhile.
            raise missing("the clip is not kept any more", "clip_not_kept") from error
        key = str(clip.path), found.st_mtime_ns, found.st_size, *known
        if (kept := self._cached(key)) is None:
            with self._blurring.slot():
                kept = self._cached(key)  # A browser asks for the same one again.
                if kept is None:
                    made = blurred_clip(clip.path, clip.begin, known, until)
                    kept = self._cache(key, (made, (0, 0)))
        return kept[0]

    def _cached(self, key: tuple[object, ...]) -> _Jpeg | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _cache(self, key: tuple[object, ...], made: _Jpeg) -> _Jpeg:
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.kept_bytes += len(made[0])
            while self.kept_bytes > _CACHE_BYTES:
                _, (old, _) = self._kept.popitem(last=False)
                self.kept_bytes -= len(old)
        return made

    def clear_cache(self) -> None:
        """Clear the cache after a deletion."""
        with self._lock:
            self._kept.clear()
            self.kept_bytes = 0


def blurred_jpeg(file: Path, box: Box | None) -> _Jpeg:
    """Return a frame as JPEG in which only a box can be recognised; nothing without a box.

    A huge picture is decoded smaller. If the place of the box in it is unknown, nothing stays.
    """

    def make(pixels: NDArray[np.uint8], shrink: int | None) -> _Jpeg:
        kept = _scaled(box, shrink)
        return as_jpeg(pixels, "frame", lambda image, whole: pixelated(image, whole, kept))

    return use_scaled_image(file, make, read_crop(file))


def _cut(box: Box | None, size: Size) -> Callable[[NDArray[np.uint8], int | None], _Jpeg | None]:
    def make(pixels: NDArray[np.uint8], shrink: int | None) -> _Jpeg | None:
        if box is not None:
            # Where the place of the box is unknown, nothing is shown: others may stand there.
            x0, y0, x1, y1 = (max(0, edge) for edge in _scaled(box, shrink) or (0, 0, 0, 0))
            pixels = pixels[y0:y1, x0:x1]
        return as_jpeg(np.ascontiguousarray(pixels), size) if pixels.size else None

    return make


def _scaled(box: Box | None, shrink: int | None) -> Box | None:
    if box is None or shrink is None:
        return None
    x0, y0, x1, y1 = (round(edge / shrink) for edge in box)
    return x0, y0, x1, y1


class QueuedEncoder(Encoder):
    """An encoder whose calls wait in a queue; raises `BusyError` if it is full."""

    def __init__(self, encoder: Encoder, queue: RequestQueue) -> None:
        super().__init__(
            encoder.manifest,
            encoder.variant,
            encoder.tokenizer,
            encoder.backend,
            encoder.calibration,
        )
        self.unqueued = encoder
        self.queue = queue

    def encode_images(
        self,
        images: "Sequence[ImageSource] | PixelArray",
        batch_size: int = 32,
        progress: Progress | None = None,
        channels: "Channels" = "rgb",
    ) -> NDArray[np.float32]:
        """Embed pictures, see `Encoder.encode_images`."""
        with self.queue.slot():
            return self.unqueued.encode_images(images, batch_size, progress, channels)

    def encode_tokens(self, tokens: TokenBatch, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences, see `Encoder.encode_tokens`."""
        with self.queue.slot():
            return self.unqueued.encode_tokens(tokens, batch_size)


class QueryPictures:
    """Pictures that users search with. Safe for several threads."""

    def __init__(self, encoder: QueuedEncoder, user_state: UserState) -> None:
        self.decoding = RequestQueue(waiting=_MOST_DECODING)
        """Decoding has a queue of its own, and does not hold the encoder."""
        self._encoder = encoder
        self._user_state = user_state

    def add(self, content: IO[bytes]) -> QueryPicture:
        """Embed and keep a picture file, which is read in pieces."""
        with self.decoding.slot():
            upload = read_upload(content)
        vector_D = self._encoder.encode_images([upload.pixels])[0]
        jpeg, size = as_jpeg(upload.pixels, "thumb")
        picture = QueryPicture(
            id=upload.sha256[:32], sha256=upload.sha256, vector_D=vector_D, jpeg=jpeg, size=size
        )
        self._user_state.keep_picture(picture, self._encoder.fingerprint)
        return picture

    def get(self, id_: str) -> QueryPicture:
        """Return a kept picture."""
        picture = self._user_state.picture(id_, self._encoder.fingerprint)
        if picture is None:
            what = "the picture of this search is not kept any more: send it again"
            raise missing(what, "query_picture_not_found")
        return picture

    def embed(self, inputs: Sequence[str | IO[bytes]]) -> NDArray[np.float32]:
        """Return (N, D) embeddings of sentences and picture files, mixed."""
        embeds_ND = np.empty((len(inputs), self._encoder.embed_dim), np.float32)
        texts = [place for place, one in enumerate(inputs) if isinstance(one, str)]
        with self._encoder.queue.slot():
            for rows in batch_slices(len(texts), _SENTENCES_AT_ONCE):
                part = texts[rows]
                sentences = [str(inputs[place]) for place in part]
                embeds_ND[part] = self._encoder.unqueued.encode_texts(sentences)
                self._encoder.queue.pause()
        for place, one in enumerate(inputs):
            if isinstance(one, str):
                continue
            with self.decoding.slot():
                pixels = read_upload(one).pixels
            embeds_ND[place] = self._encoder.encode_images([pixels])[0]
        return embeds_ND
