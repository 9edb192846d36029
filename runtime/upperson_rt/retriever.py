"""Sentences and pictures in, pictures of a gallery out."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_count, check_object, is_finite
from upperson_rt.encoder import Encoder
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.gallery.records import check_hits
from upperson_rt.phrases import ParsedSentence, Phrase, parse
from upperson_rt.phrases.evidence import (
    MOST_PARAPHRASES,
    Evidence,
    Explanation,
    embed_wordings,
    weighable,
)
from upperson_rt.printable import shown
from upperson_rt.query_log import QueryLog, describe_picture

if TYPE_CHECKING:  # Loads Pillow, which sentences do without.
    from PIL import Image

    from upperson_rt.preprocess import Channels, ImageSource

__all__ = ["Query", "Retriever", "find_alike", "search_without"]

Query: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"
"""A `str` is always a sentence; a `Path`, a Pillow image or an array as for `encode_images` is a
picture."""

_CANDIDATES = 40
"""Pictures that a sentence with a denial looks at, at least: up to 20 hits do not depend on k."""
_MOST_CANDIDATES = 4000

QueryT = TypeVar("QueryT", bound=Query)


class Retriever:
    """Finds the pictures of a gallery that a sentence describes or that look like a picture.

    Safe to use from several threads.

        encoder = upperson_rt.open("bundle")
        with Gallery.open("gallery", encoder.fingerprint, encoder.embed_dim) as gallery:
            hits = Retriever(encoder, gallery).query("a woman in a red coat", k=5)
    """

    def __init__(self, encoder: Encoder, gallery: Gallery, log: QueryLog | None = None) -> None:
        """Search a gallery that was opened with the encoder's fingerprint.

        Args:
            encoder: Embeds the queries.
            gallery: Where to look.
            log: Gets a line a query before its hits are returned; a query whose line cannot be
                written fails.

        Raises:
            UsageError: One of them is something else.
        """
        check_object(encoder, "an encoder", ("encode_texts", "encode_images", "embed_dim"))
        check_object(gallery, "a gallery", ("search", "search_with_vectors", "vectors_of"))
        if log is not None:
            check_object(log, "a query log", ("write",))
        self.encoder = encoder
        self.gallery = gallery
        self.log = log
        self._evidence = Evidence(encoder.encode_texts)

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
        """Find the k best pictures.

        What a sentence denies (*without a bag*, *no hat*, *not wearing glasses*) is left out of its
        embedding; a picture loses up to `MOST_DENIED` of its score for what speaks for that.

        Args:
            query: A sentence or a picture, or a list of them, which may be mixed. A `str` is
                always a sentence; the name of a file is a `Path`.
            k: Hits per query.
            where: Only items that pass.
            by_track: One hit a track, with its best picture; items without a track stand alone.
            channels: Order of the colours in arrays; ``bgr`` for frames of OpenCV.
            paraphrases: Wordings of each sentence whose embeddings are averaged, 1 to
                `MOST_PARAPHRASES`; the grammar makes them, and 1 is the sentence as it is.

        Returns:
            The hits of the query, best first; for a list of queries a list of such lists.

        Raises:
            InputError: A sentence is empty, or a picture or the log cannot be used.
            UsageError: k is below 1, or paraphrases out of range.
            BackendError: A tower cannot be loaded or fails.
            IntegrityError: A tower gives wrong results, or the gallery is damaged.
        """
        several = isinstance(query, list | tuple)
        queries: list[Query] = list(query) if isinstance(query, list | tuple) else [query]
        if not queries:
            return []
        paraphrases = check_count(paraphrases, "paraphrases", most=MOST_PARAPHRASES)
        parsed = [parse(asked) if isinstance(asked, str) else None for asked in queries]
        embeds_QD = self._embed(queries, parsed, channels, paraphrases)
        found: list[list[Hit]] = [[] for _ in queries]
        plain = [i for i, sentence in enumerate(parsed) if sentence is None or not sentence.denied]
        if plain:
            hits_of = self.gallery.search(embeds_QD[plain], k, where, by_track)
            for i, hits in zip(plain, hits_of, strict=True):
                found[i] = hits
        for i, sentence in enumerate(parsed):
            if sentence is not None and sentence.denied:
                found[i] = search_without(
                    self.gallery, self._evidence, embeds_QD[i], sentence.denied, k, where, by_track
                )
        for asked, hits in zip(queries, found, strict=True):
            self._log(asked, hits, k, where, by_track)
        return found if several else found[0]

    def explain(self, sentence: str, hits: Sequence[Hit]) -> Explanation:
        """Weigh each phrase of a sentence in the pictures that were found.

        Args:
            sentence: What was asked.
            hits: What `query` found for it, or any hits of the gallery.

        Returns:
            The phrases, and what speaks for each in every hit.

        Raises:
            InputError: The sentence is no text, or what was found are no hits.
            BackendError: The text tower cannot be loaded or fails.
            IntegrityError: The text tower gives wrong results, or the gallery is damaged.
        """
        parsed = parse(sentence)
        phrases = weighable(parsed)
        evidence_HP = np.full((len(check_hits(hits)), len(phrases)), np.nan, dtype=np.float32)
        vectors = self.gallery.vectors_of(hits)
        there = [row for row, hit in enumerate(hits) if hit.id in vectors]
        if there:
            images_ND = np.stack([vectors[hits[row].id] for row in there])
            for column, phrase in enumerate(phrases):
                evidence_HP[there, column] = self._evidence.of(phrase, images_ND)
        return Explanation(parsed=parsed, phrases=phrases, evidence_HP=evidence_HP)

    def delete_like(
        self,
        image: "ImageSource",
        min_score: float,
        where: Filter | None = None,
        dry_run: bool = False,
        channels: "Channels" = "rgb",
    ) -> list[Hit]:
        """Delete the pictures that look like a picture, such as all of a person who asked for it.

        Every item is compared exactly, whatever index the gallery has. Looks are no identity: run
        it dry first, and look at what would go.

        Args:
            image: The picture: a file, a Pillow image or a uint8 array.
            min_score: Cosine from which an item counts as alike, -1 to 1. What is a good value
                depends on the model; a dry run shows the scores.
            where: Only items that pass.
            dry_run: Delete nothing.
            channels: Order of the colours if the picture is an array.

        Returns:
            What was deleted, or would be, best match first.

        Raises:
            InputError: The picture or the log cannot be used, or the gallery not be written.
            UsageError: min_score is out of range.
            BackendError: The image tower cannot be loaded or fails.
            IntegrityError: The image tower gives wrong results, or the gallery is damaged.
        """
        _check_cosine(min_score)
        embed_1D = self.encoder.encode_images([image], channels=channels)
        hits = find_alike(self.gallery, embed_1D[0], min_score, where)
        asked = Path(image) if isinstance(image, str) else image
        action = "dry run of delete_like" if dry_run else "delete_like"
        self._log(asked, hits, len(hits), where, action=action)
        if not dry_run:
            self.gallery.delete([hit.item.key for hit in hits])
        return hits

    def _log(
        self,
        asked: "Query",
        hits: list[Hit],
        k: int,
        where: Filter | None,
        by_track: bool = False,
        action: str = "query",
    ) -> None:
        if self.log is not None:
            self.log.write(
                asked if isinstance(asked, str) else describe_picture(asked),
                hits,
                k=k,
                where=where,
                by_track=by_track,
                gallery=self.gallery.location,
                action=action,
            )

    def _embed(
        self,
        queries: "Sequence[Query]",
        parsed: Sequence[ParsedSentence | None],
        channels: "Channels",
        count: int,
    ) -> NDArray[np.float32]:
        """Return (Q, D); each tower runs once, and only if it is needed."""
        embeds = np.empty((len(queries), self.encoder.embed_dim), dtype=np.float32)
        texts = {i: sentence for i, sentence in enumerate(parsed) if sentence is not None}
        images: dict[int, ImageSource] = {
            i: query for i, query in enumerate(queries) if not isinstance(query, str)
        }
        if texts:
            embeds[list(texts)] = embed_wordings(
                self.encoder.encode_texts, list(texts.values()), count
            )
        if images:
            embeds[list(images)] = self.encoder.encode_images(
                list(images.values()), channels=channels
            )
        return embeds


def search_without(
    gallery: Gallery,
    evidence: Evidence,
    embed_D: NDArray[np.float32],
    denied: Sequence[Phrase],
    k: int,
    where: Filter | None,
    by_track: bool,
) -> list[Hit]:
    """Search for one sentence and take off for what it denies.

    A bounded number of candidates is looked at, which are looked for away from what is denied: what
    is not among them was no good answer to what the sentence asks for.

    Args:
        gallery: Where to look.
        evidence: Weighs phrases in pictures.
        embed_D: (D,) of what the sentence asks for, of unit length.
        denied: What it does not want.
        k: Hits.
        where: Only items that pass.
        by_track: One hit a track.
    """
    k = check_count(k, "k")
    candidates = max(k, _CANDIDATES, min(2 * k, _MOST_CANDIDATES))
    hits, images_ND = gallery.search_with_vectors(
        evidence.away(embed_D, denied), candidates, where, by_track
    )
    if not hits:
        return []
    asked_N = (images_ND.astype(np.float64) @ embed_D.astype(np.float64)).astype(np.float32)
    scores_N = asked_N - evidence.against(denied, images_ND)
    best = sorted(range(len(hits)), key=lambda row: (-scores_N[row], hits[row].id))[:k]
    return [replace(hits[row], score=float(scores_N[row])) for row in best]


def find_alike(
    gallery: Gallery,
    vector_D: NDArray[np.float32],
    min_score: float,
    where: Filter | None = None,
) -> list[Hit]:
    """Return every item that is alike, best first; each is compared, whatever index there is.

    Args:
        gallery: Where to look.
        vector_D: (D,) of unit length.
        min_score: Cosine from which an item counts as alike, -1 to 1.
        where: Only items that pass.

    Raises:
        UsageError: min_score is out of range.
        IntegrityError: The gallery is damaged.
    """
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
        raise UsageError(f"min_score is a cosine from -1 to 1, got {shown(min_score)}")
