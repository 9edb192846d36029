"""Sentences and pictures in, pictures of a gallery out: `search` for Python programs."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast, overload

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import parse_query
from upperson_phrases.evidence import Explanation
from upperson_rt.arguments import check_object, check_text, is_finite
from upperson_rt.encoder import Encoder
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.printable import safe_repr
from upperson_rt.search.query import SearchRequest
from upperson_rt.search.query_log import QueryLogger, describe_picture
from upperson_rt.search.service import SearchResult, SearchService

if TYPE_CHECKING:  # Loads Pillow, which sentences do without.
    from PIL import Image

    from upperson_rt.preprocess import Channels, ImageSource, PixelArray

Query: TypeAlias = "str | os.PathLike[str] | Image.Image | PixelArray"
"""A `str` is always a sentence; a `Path`, a Pillow image or an array as for `encode_images` is a
picture."""

QueryT = TypeVar("QueryT", bound=Query)


class Retriever:
    """Finds the pictures of a gallery that a sentence describes or that look like a picture.

    Safe to use from several threads. Methods raise InputError if a sentence, a picture or the log
    cannot be used, and UsageError, BackendError and IntegrityError as an encoder and a gallery do.

        encoder = upperson_rt.open("bundle")
        with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            hits = Retriever(encoder, gallery).query("a woman in a red coat", k=5)
    """

    def __init__(self, encoder: Encoder, gallery: Gallery, log: QueryLogger | None = None) -> None:
        """Search a gallery that was opened with the encoder's fingerprint.

        ``log``, such as a `upperson_rt.QueryLog`, gets a line a query before its hits are returned;
        if it cannot be written, the query fails.
        """
        check_object(encoder, "an encoder", ("encode_texts", "encode_images", "embed_dim"))
        check_object(gallery, "a gallery", ("search", "search_with_vectors", "vectors_of"))
        if log is not None:
            check_object(log, "a query log", ("write",))
        self.encoder = encoder
        self.gallery = gallery
        self.log = log
        self.service = SearchService(encoder, gallery)

    @overload
    def query(
        self,
        query: "list[QueryT] | tuple[QueryT, ...]",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
        paraphrases: int = 1,
    ) -> list[list[Hit]]: ...

    @overload
    def query(
        self,
        query: "Query",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
        paraphrases: int = 1,
    ) -> list[Hit]: ...

    def query(
        self,
        query: "Query | list[QueryT] | tuple[QueryT, ...]",
        k: int = 10,
        where: Filter | None = None,
        by_track: bool = False,
        channels: "Channels" = "rgb",
        paraphrases: int = 1,
    ) -> list[Hit] | list[list[Hit]]:
        """Find the k best pictures, best first; for a list of queries a list of such lists.

        Excluded phrases (*without a bag*, *no hat*, *not wearing glasses*) are left out of the
        embedding; a picture loses up to `MOST_EXCLUDED` of its score for their evidence. Arguments
        as of `SearchRequest`.

        Args:
            query: A sentence or a picture, or a list of them, which may be mixed. A `str` is
                always a sentence; the name of a file is a `Path`.
            k: Hits per query.
            where: Only items that pass.
            by_track: One hit a track, with its best picture; items without a track stand alone.
            channels: Order of the colours in arrays; ``bgr`` for frames of OpenCV.
            paraphrases: Wordings of each sentence whose embeddings are averaged.
        """
        several = isinstance(query, list | tuple)
        queries: list[Query] = list(query) if isinstance(query, list | tuple) else [query]
        if not queries:
            return []
        requests = [
            SearchRequest(
                sentence=one if isinstance(one, str) else None,
                picture=None if isinstance(one, str) else one,
                channels=channels,
                where=where,
                k=k,
                by_track=by_track,
                paraphrases=paraphrases,
            )
            for one in queries
        ]
        found = [result.hits for result in self.service.search_all(requests)]
        for one, hits in zip(queries, found, strict=True):
            self._log(one, hits, k, where, by_track)
        return found if several else found[0]

    def search(self, request: SearchRequest) -> SearchResult:
        """Run one search with what `SearchRequest` offers beside hits."""
        result = self.service.search(request)
        details: dict[str, Any] = {}
        if request.has_both:
            picture = describe_picture(cast("ImageSource", request.picture))
            details = {"picture": picture, "share": request.picture_share}
        if result.verdict is not None:
            details |= result.verdict.for_log()
        query = request.picture if request.sentence is None else request.sentence
        self._log(
            cast("Query", query),
            result.hits,
            request.k,
            request.where,
            request.by_track,
            details=details or None,
        )
        return result

    def explain(self, sentence: str, hits: Sequence[Hit]) -> Explanation:
        """Compute the evidence of each phrase of a sentence in hits of the gallery."""
        return self.service.explain(parse_query(check_text(sentence, "the sentence")), hits)

    def delete_like(
        self,
        image: "ImageSource",
        min_score: float,
        where: Filter | None = None,
        dry_run: bool = False,
        channels: "Channels" = "rgb",
    ) -> list[Hit]:
        """Delete the pictures that look like a picture, and return them, best match first.

        Every item is compared exactly, whatever index the gallery has. Looks are no identity: run
        it dry first, and look at what would go.

        Args:
            image: The picture: a file, a Pillow image or a uint8 array.
            min_score: Cosine from which an item counts as alike, -1 to 1. What is a good value
                depends on the model; a dry run shows the scores.
            where: Only items that pass.
            dry_run: Delete nothing.
            channels: Order of the colours if the picture is an array.
        """
        _check_cosine(min_score)
        embed_1D = self.encoder.encode_images([image], channels=channels)
        hits = find_alike(self.gallery, embed_1D[0], min_score, where)
        query = Path(image) if isinstance(image, str) else image
        action = "dry run of delete_like" if dry_run else "delete_like"
        self._log(query, hits, len(hits), where, action=action)
        if not dry_run:
            self.gallery.delete([hit.item.key for hit in hits])
        return hits

    def _log(
        self,
        query: "Query",
        hits: list[Hit],
        k: int,
        where: Filter | None,
        by_track: bool = False,
        action: str = "query",
        details: "Mapping[str, Any] | None" = None,
    ) -> None:
        if self.log is not None:
            self.log.write(
                query if isinstance(query, str) else describe_picture(query),
                hits,
                k=k,
                where=where,
                by_track=by_track,
                gallery=self.gallery.location,
                action=action,
                details=details,
            )


def find_alike(
    gallery: Gallery, vector_D: NDArray[np.float32], min_score: float, where: Filter | None = None
) -> list[Hit]:
    """Return every item that is alike, best first; each is compared, whatever index there is."""
    _check_cosine(min_score)
    found: list[tuple[float, Item]] = []
    for items, vectors_ND in gallery.vectors(where):
        scores = vectors_ND @ vector_D
        found += [(float(scores[i]), items[i]) for i in np.flatnonzero(scores >= min_score)]
    ids = gallery.ids([item.key for _, item in found])
    hits = [
        Hit(id=ids[item.key], score=score, item=item)
        for score, item in found
        if item.key in ids  # Else it went meanwhile.
    ]
    return sorted(hits, key=lambda hit: (-hit.score, hit.id))


def _check_cosine(min_score: float) -> None:
    if not (is_finite(min_score) and -1 <= min_score <= 1):
        message = f"min_score is a cosine from -1 to 1, got {safe_repr(min_score)}"
        raise UsageError(message, code="out_of_range", what="min_score")
