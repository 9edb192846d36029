"""Sentences and pictures in, pictures of a gallery out."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Hit
from upperson_rt.query_log import QueryLog, describe_picture

if TYPE_CHECKING:  # Loads Pillow, which sentences do without.
    from PIL import Image

    from upperson_rt.preprocess import Channels, ImageSource

__all__ = ["Query", "Retriever"]

Query: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"
"""A `str` is always a sentence; a `Path`, a Pillow image or an array as for `encode_images` is a
picture."""

QueryT = TypeVar("QueryT", bound=Query)


class Retriever:
    """Finds the pictures of a gallery that a sentence describes or that look like a picture.

    Safe to use from several threads.

        encoder = upperson_rt.open("bundle")
        with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            hits = Retriever(encoder, gallery).query("a woman in a red coat", k=5)
    """

    def __init__(self, encoder: Encoder, gallery: Gallery, log: QueryLog | None = None) -> None:
        """Put the two together; the gallery was opened with the encoder's fingerprint.

        Args:
            encoder: Embeds the queries.
            gallery: Where to look.
            log: Gets a line a query before its hits are returned; a query whose line cannot be
                written fails.
        """
        self.encoder = encoder
        self.gallery = gallery
        self.log = log

    @overload
    def query(
        self,
        query: "list[QueryT] | tuple[QueryT, ...]",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
    ) -> list[list[Hit]]: ...

    @overload
    def query(
        self,
        query: "Query",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
    ) -> list[Hit]: ...

    def query(
        self,
        query: "Query | list[QueryT] | tuple[QueryT, ...]",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
    ) -> list[Hit] | list[list[Hit]]:
        """Find the k best pictures.

        Args:
            query: A sentence or a picture, or a list of them, which may be mixed. A `str` is
                always a sentence; the name of a file is a `Path`.
            k: Hits per query.
            where: Only items that pass.
            by_track: One hit a track, with its best picture; items without a track stand alone.
            channels: Order of the colours in arrays; ``bgr`` for frames of OpenCV.

        Returns:
            The hits of the query, best first; for a list of queries a list of such lists.

        Raises:
            InputError: A sentence is empty, a picture cannot be used, or the log not be written.
            UsageError: k is below 1.
            BackendError: A tower cannot be loaded or fails.
            IntegrityError: A tower gives wrong results, or the gallery is damaged.
        """
        several = isinstance(query, list | tuple)
        queries: list[Query] = list(query) if isinstance(query, list | tuple) else [query]
        if not queries:
            return []
        found = self.gallery.search(self._embed(queries, channels), k, where, by_track)
        if self.log is not None:
            for asked, hits in zip(queries, found, strict=True):
                self.log.write(
                    asked if isinstance(asked, str) else describe_picture(asked),
                    hits,
                    k=k,
                    where=where,
                    by_track=by_track,
                    gallery=self.gallery.location,
                )
        return list(found) if several else found[0]

    def _embed(self, queries: "Sequence[Query]", channels: "Channels") -> NDArray[np.float32]:
        """Return (Q, D); each tower runs once, and only if it is needed."""
        embeds = np.empty((len(queries), self.encoder.embed_dim), dtype=np.float32)
        texts = {i: query for i, query in enumerate(queries) if isinstance(query, str)}
        images: dict[int, ImageSource] = {
            i: query for i, query in enumerate(queries) if not isinstance(query, str)
        }
        if texts:
            embeds[list(texts)] = self.encoder.encode_texts(list(texts.values()))
        if images:
            embeds[list(images)] = self.encoder.encode_images(
                list(images.values()), channels=channels
            )
        return embeds
