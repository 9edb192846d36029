"""From requests to query embeddings: each sentence is parsed, tokenized and embedded once."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.phrases import ParsedSentence, Phrase, parse
from upperson_rt.phrases.evidence import Evidence, paraphrases
from upperson_rt.search.calibration import BACKGROUND_SENTENCES
from upperson_rt.search.feedback import refine, share_of_relevant
from upperson_rt.search.request import SearchRequest
from upperson_rt.search.vocabulary import Vocabulary
from upperson_rt.tokenizer import token_lengths

__all__ = ["EmbeddedQuery", "QueryEncoder", "QuerySentence"]

_KEPT_SENTENCES = 2000


@dataclass(frozen=True, kw_only=True)
class QuerySentence:
    """A sentence as the grammar and the text tower read it."""

    parsed: ParsedSentence
    vector_D: NDArray[np.float32]
    """(D,) of what it wants, without excluded phrases, of unit length."""
    words: Mapping[str, Sequence[str]]
    """Its words with their tokens, see `TokenBatch.words`."""
    token_count: int
    """Tokens of what it wants, without the special ones; the context's at most."""
    is_truncated: bool
    """Whether it was longer than the model's context, and its end was cut off."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedQuery:
    """What a gallery is searched with."""

    vector_D: NDArray[np.float32]
    """(D,) of unit length."""
    picture_share: float
    """Weight of pictures in it, 0 for a sentence to 1 for a picture; feedback is pictures, too."""
    sentence: QuerySentence | None
    is_sentence_only: bool
    """Whether its embedding comes from words, moved by feedback at most."""

    @property
    def excluded(self) -> tuple[Phrase, ...]:
        """What the sentence excludes."""
        return () if self.sentence is None else self.sentence.parsed.denied


class QueryEncoder:
    """Embeds requests, and keeps what it learned of sentences and words.

    Belongs to an encoder, not to a gallery: one may serve several. Safe to use from several
    threads.
    """

    def __init__(self, encoder: Encoder) -> None:
        """Use an encoder, whose towers are loaded when they are first needed."""
        self.encoder = encoder
        self.evidence = Evidence(encoder.encode_texts)
        self.vocabulary = Vocabulary(encoder)
        self._kept: OrderedDict[tuple[str, int], QuerySentence] = OrderedDict()
        self._background_SD: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def embed(self, requests: Sequence[SearchRequest]) -> list[EmbeddedQuery]:
        """Embed requests; each tower runs once, and only if it is needed.

        Raises:
            InputError: A sentence is empty, or a picture cannot be used.
            BackendError: A tower cannot be loaded or fails.
            IntegrityError: A tower gives wrong results.
        """
        sentences = self._sentences(
            [(one.sentence, one.paraphrases) for one in requests if one.sentence is not None]
        )
        pictures = self._pictures(requests)
        return [
            _combined(
                request,
                None
                if request.sentence is None
                else sentences[request.sentence, request.paraphrases],
                picture_D,
            )
            for request, picture_D in zip(requests, pictures, strict=True)
        ]

    def background(self) -> NDArray[np.float32]:
        """Return the (S, D) embeddings of `BACKGROUND_SENTENCES`, which are made once."""
        if self._background_SD is None:
            self._background_SD = self.encoder.encode_texts(BACKGROUND_SENTENCES)
        return self._background_SD

    def _sentences(self, wanted: Sequence[tuple[str, int]]) -> dict[tuple[str, int], QuerySentence]:
        """Read and embed sentences with so many wordings, those that are not kept in one batch."""
        with self._lock:
            found = {key: self._kept[key] for key in wanted if key in self._kept}
            for key in found:
                self._kept.move_to_end(key)
        new = [key for key in dict.fromkeys(wanted) if key not in found]
        if not new:
            return found
        parsed = [parse(sentence) for sentence, _ in new]
        wordings = [paraphrases(one, count) for one, (_, count) in zip(parsed, new, strict=True)]
        tokens = self.encoder.tokenizer.encode([text for own in wordings for text in own])
        all_TD = self.encoder.encode_tokens(tokens)
        truncated, lengths = frozenset(tokens.truncated), token_lengths(tokens.input_ids)
        first = 0
        for key, one, own in zip(new, parsed, wordings, strict=True):
            mean_D = all_TD[first : first + len(own)].mean(axis=0)
            found[key] = QuerySentence(
                parsed=one,
                vector_D=mean_D / np.linalg.norm(mean_D),
                words=tokens.words(first),
                token_count=int(lengths[first]) - 2,
                is_truncated=first in truncated,
            )
            first += len(own)
        with self._lock:
            self._kept |= {key: found[key] for key in new}
            while len(self._kept) > _KEPT_SENTENCES:
                self._kept.popitem(last=False)
        return found

    def _pictures(self, requests: Sequence[SearchRequest]) -> list[NDArray[np.float32] | None]:
        """Return the embedding of each request's picture, None where it has none."""
        found = [_checked(request.embedding, self.encoder.embed_dim) for request in requests]
        by_order: dict[Any, list[int]] = {}
        for row, request in enumerate(requests):
            if request.picture is not None and found[row] is None:
                by_order.setdefault(request.channels, []).append(row)
        for channels, rows in by_order.items():
            pictures: list[Any] = [requests[row].picture for row in rows]
            embeds_ND = self.encoder.encode_images(pictures, channels=channels)
            for row, embed_D in zip(rows, embeds_ND, strict=True):
                found[row] = embed_D
        return found


def _checked(embedding: NDArray[np.float32] | None, embed_dim: int) -> NDArray[np.float32] | None:
    """Return an embedding that was given instead of a picture, of unit length."""
    if embedding is None:
        return None
    length = float(np.linalg.norm(embedding))
    if embedding.shape != (embed_dim,) or not 0 < length < float("inf"):
        raise InputError(
            f"expected an embedding of {embed_dim} finite numbers, found {embedding.shape}, of "
            f"length {length:g}"
        )
    return embedding


def _combined(
    request: SearchRequest,
    sentence: QuerySentence | None,
    picture_D: NDArray[np.float32] | None,
) -> EmbeddedQuery:
    """Join sentence, picture and feedback."""
    share = 0.0 if picture_D is None else 1.0
    if sentence is not None and picture_D is not None:
        share = request.picture_share
        query_D = _unit((1 - share) * sentence.vector_D + share * picture_D)
    elif sentence is not None:
        query_D = sentence.vector_D
    elif picture_D is not None:
        query_D = picture_D
    relevant = 0 if request.relevant_ND is None else len(request.relevant_ND)
    return EmbeddedQuery(
        vector_D=refine(query_D, request.relevant_ND, request.not_relevant_ND),
        picture_share=1 - (1 - share) * (1 - share_of_relevant(relevant)),
        sentence=sentence,
        is_sentence_only=picture_D is None,
    )


def _unit(vector_D: NDArray[np.float32]) -> NDArray[np.float32]:
    length = float(np.linalg.norm(vector_D))
    if not length:
        raise IntegrityError(
            "sentence and picture cancel each other out: choose another picture_share"
        )
    unit: NDArray[np.float32] = (vector_D / length).astype(np.float32)
    return unit
