"""The encoder as the console's requests share it: a bounded queue, and pictures to search with."""

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from upperson_console.memory import AskedPicture, Memory
from upperson_console.pictures import as_jpeg, read_upload
from upperson_console.problems import ProblemError
from upperson_console.turns import Turns
from upperson_rt.encoder import Encoder, Progress
from upperson_rt.tokenizer import TokenBatch
from upperson_rt.towers import batch_slices

if TYPE_CHECKING:
    from upperson_rt.preprocess import Channels, ImageSource

__all__ = ["QueryPictures", "QueuedEncoder"]

_SENTENCES_AT_ONCE = 4
"""Of one request, before another client has its turn."""
_MOST_DECODING = 4
"""Pictures that wait to be decoded. With those that wait for the encoder they are fewer than the
threads of the server, so that it shows pictures meanwhile."""


class QueuedEncoder(Encoder):
    """An encoder whose calls wait in a queue; `BusyError` where too many wait already."""

    def __init__(self, encoder: Encoder, turns: Turns) -> None:
        """Queue the calls of an encoder."""
        super().__init__(encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend)
        self.unqueued = encoder
        self.turns = turns

    def encode_images(
        self,
        images: "Sequence[ImageSource] | NDArray[np.uint8]",
        batch_size: int = 32,
        progress: Progress | None = None,
        channels: "Channels" = "rgb",
    ) -> NDArray[np.float32]:
        """Embed pictures, see `Encoder.encode_images`."""
        with self.turns.turn():
            return self.unqueued.encode_images(images, batch_size, progress, channels)

    def encode_tokens(self, tokens: TokenBatch, batch_size: int = 64) -> NDArray[np.float32]:
        """Embed sentences, see `Encoder.encode_tokens`."""
        with self.turns.turn():
            return self.unqueued.encode_tokens(tokens, batch_size)


class QueryPictures:
    """Pictures that users search with. Safe to use from several threads."""

    def __init__(self, encoder: QueuedEncoder, memory: Memory) -> None:
        """Embed pictures with an encoder, and keep them.

        Args:
            encoder: Of the bundle.
            memory: Keeps the pictures.
        """
        self.decoding = Turns(waiting=_MOST_DECODING)
        """Pictures are decoded beside the encoder, and do not hold it."""
        self._encoder = encoder
        self._memory = memory

    def add(self, content: IO[bytes]) -> AskedPicture:
        """Embed a picture that was sent, and keep it.

        Args:
            content: Its file, read in pieces.

        Raises:
            InputError: It is no picture.
            BusyError: Too many wait for the encoder.
        """
        with self.decoding.turn():
            upload = read_upload(content)
        vector_D = self._encoder.encode_images([upload.pixels])[0]
        jpeg, size = as_jpeg(upload.pixels, "thumb")
        picture = AskedPicture(
            id=upload.sha256[:32], sha256=upload.sha256, vector_D=vector_D, jpeg=jpeg, size=size
        )
        self._memory.keep_picture(picture, self._encoder.fingerprint)
        return picture

    def get(self, id_: str) -> AskedPicture:
        """Return a picture that was added.

        Raises:
            ProblemError: There is none.
        """
        picture = self._memory.picture(id_, self._encoder.fingerprint)
        if picture is None:
            raise ProblemError(
                404, "the picture of this search is not kept any more: give it again"
            )
        return picture

    def embed(self, inputs: Sequence[str | IO[bytes]]) -> NDArray[np.float32]:
        """Return (N, D) embeddings of sentences and files of pictures, mixed.

        Raises:
            InputError: One cannot be used.
            BusyError: Too many wait for the encoder.
        """
        embeds_ND = np.empty((len(inputs), self._encoder.embed_dim), np.float32)
        texts = [place for place, one in enumerate(inputs) if isinstance(one, str)]
        with self._encoder.turns.turn():
            for rows in batch_slices(len(texts), _SENTENCES_AT_ONCE):
                part = texts[rows]
                sentences = [str(inputs[place]) for place in part]
                embeds_ND[part] = self._encoder.unqueued.encode_texts(sentences)
                self._encoder.turns.pause()
        for place, one in enumerate(inputs):
            if isinstance(one, str):
                continue
            with self.decoding.turn():
                pixels = read_upload(one).pixels
            embeds_ND[place] = self._encoder.encode_images([pixels])[0]
        return embeds_ND
