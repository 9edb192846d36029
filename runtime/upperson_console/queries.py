"""The encoder behind a request queue, and query pictures."""

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from upperson_console.limits import RequestQueue
from upperson_console.pictures import as_jpeg, read_upload
from upperson_console.problems import missing
from upperson_console.user_state import QueryPicture, UserState
from upperson_rt.encoder import Encoder, Progress
from upperson_rt.tokenizer import TokenBatch
from upperson_rt.towers import batch_slices

if TYPE_CHECKING:
    from upperson_rt.preprocess import Channels, ImageSource

_SENTENCES_AT_ONCE = 4
"""Of one request, before the queue serves another client."""
_MOST_DECODING = 4
"""Waiting query pictures. With the encoder's queue they are fewer than the server's threads."""


class QueuedEncoder(Encoder):
    """An encoder whose calls wait in a queue; raises `BusyError` if it is full."""

    def __init__(self, encoder: Encoder, queue: RequestQueue) -> None:
        """Queue the calls of an encoder."""
        super().__init__(encoder.manifest, encoder.variant, encoder.tokenizer, encoder.backend)
        self.unqueued = encoder
        self.queue = queue

    def encode_images(
        self,
        images: "Sequence[ImageSource] | NDArray[np.uint8]",
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
        """Embed pictures with an encoder, and keep them in the user state store."""
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
