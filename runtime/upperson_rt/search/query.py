"""From a `SearchRequest` to its query embedding; each sentence is parsed and embedded once."""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import ParsedSentence, Phrase, parse, parse_query
from upperson_phrases.evidence import MOST_PARAPHRASES, Evidence, paraphrases
from upperson_phrases.lexicon import PERSON_PLURALS, SMALL_WORDS
from upperson_phrases.spelling import correction
from upperson_rt.arguments import check_count, check_text, is_finite
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import Filter
from upperson_rt.printable import safe_repr
from upperson_rt.search.background import BACKGROUND_SENTENCES
from upperson_rt.tokenizer import token_lengths

if TYPE_CHECKING:
    from PIL import Image

    from upperson_rt.preprocess import Channels, PixelArray

Picture: TypeAlias = "str | os.PathLike[str] | Image.Image | PixelArray | NDArray[np.float32]"
"""A picture as for `Encoder.encode_images`, or its embedding: float32 (D,) of unit length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchRequest:
    """One search: a sentence, a picture or both, moved by relevance feedback.

    Raises:
        UsageError: It has neither sentence nor picture, or a number is out of range.
    """

    sentence: str | None = None
    picture: "Picture | None" = None
    picture_share: float = 0.5
    """Weight of the picture where there is a sentence as well, 0 to 1."""
    channels: "Channels" = "rgb"
    """Colour order of a picture that is an array; ``bgr`` for frames of OpenCV."""
    relevant_ND: NDArray[np.float32] | None = None
    """Embeddings (N, D) of hits that a user marked as right, see `feedback.refine`."""
    not_relevant_ND: NDArray[np.float32] | None = None
    """Embeddings (N, D) of hits that a user marked as wrong."""
    where: Filter | None = None
    k: int = 10
    by_track: bool = False
    """One hit a track, with its best picture; items without a track stand alone."""
    paraphrases: int = 1
    """Wordings of the sentence whose embeddings are averaged, 1 to `MOST_PARAPHRASES`."""
    explain: bool = False
    """Also compute the evidence of each phrase in each hit."""
    calibrate: bool = False
    """Also compute the verdict, and a likelihood and a match label for each hit."""
    notices: bool = False
    """Also report how the sentence was read. Embeds words that this model was not tried on yet."""

    def __post_init__(self) -> None:
        if self.sentence is None and self.picture is None:
            raise UsageError("a search needs a sentence or a picture: give one of them")
        if self.sentence is not None:
            object.__setattr__(self, "sentence", check_text(self.sentence, "the sentence"))
        if not (is_finite(self.picture_share) and 0 <= self.picture_share <= 1):
            raise UsageError(
                f"picture_share must be a number from 0 to 1, found {safe_repr(self.picture_share)}"
            )
        object.__setattr__(self, "k", check_count(self.k, "k"))
        paraphrases = check_count(self.paraphrases, "paraphrases", most=MOST_PARAPHRASES)
        object.__setattr__(self, "paraphrases", paraphrases)

    @property
    def has_both(self) -> bool:
        """Whether it has a sentence and a picture."""
        return self.sentence is not None and self.picture is not None

    @property
    def embedding(self) -> NDArray[np.float32] | None:
        """The picture if it is an embedding (D,), else None."""
        picture: Any = self.picture
        is_one = isinstance(picture, np.ndarray) and picture.dtype == np.float32
        return picture if is_one and picture.ndim == 1 else None


# --- Relevance feedback

_TOWARDS = 0.8
"""Share of the way to the relevant pictures, at most: the query keeps the rest."""
_SOON = 0.3
"""The first relevant picture goes most of that way: a picture says more than a sentence."""
_AWAY = 0.4
"""Share of the query's length, at most, away from pictures that are not relevant."""
_LATER = 3.0
"""One such picture says little, several of a kind say more."""


def refine(
    query_D: NDArray[np.float32],
    relevant_ND: NDArray[np.float32] | None,
    not_relevant_ND: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Return the (D,) query moved by feedback (N, D), all of unit length; the same without any."""
    moved = query_D.astype(np.float64)
    if relevant_ND is not None and len(relevant_ND):
        share = share_of_relevant(len(relevant_ND))
        moved = (1 - share) * moved + share * _unit(relevant_ND.mean(axis=0, dtype=np.float64))
    elif not_relevant_ND is None or not len(not_relevant_ND):
        return query_D
    if not_relevant_ND is not None and len(not_relevant_ND):
        share = _AWAY * len(not_relevant_ND) / (len(not_relevant_ND) + _LATER)
        moved = _unit(moved) - share * not_relevant_ND.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(moved))
    if length < 1e-6:  # The marks cancel the query out.
        return query_D
    return (moved / length).astype(np.float32)


def share_of_relevant(count: int) -> float:
    """Return the share of a refined query that comes from this many relevant pictures."""
    return _TOWARDS * count / (count + _SOON)


def _unit(vector_D: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector_D))
    return vector_D / length if length > 1e-12 else vector_D


# --- Words that a model has not learned

_OFF_TOPIC = ("parliament", "molecule", "theorem", "orchestra", "volcano", "inflation")
"""Words that describe no person."""
_REQUESTS = frozenset({"find", "look", "looking", "please", "search", "show"})
"""Words that say nothing about a person, beside the grammar's small words."""
_SAME = 1e-3
"""Distance of embeddings of unit length below which two words are the same to a model."""
_KEPT = 10_000


class Vocabulary:
    """Which words a model has learned. Safe to use from several threads."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._has_learned: dict[str, bool] = {}

    def unknown(self, words: Mapping[str, Sequence[str]]) -> list[str]:
        """Return the words (of `TokenBatch.words`) that the model does not know."""
        tokenizer = self._encoder.tokenizer
        broken = {word for word, tokens in words.items() if tokenizer.is_broken(tokens)}
        whole = {
            word: len(tokens)
            for word, tokens in words.items()
            if word not in broken and word.lower() not in SMALL_WORDS | _REQUESTS
        }
        if len(self._has_learned) + len(whole) > _KEPT:
            self._has_learned.clear()
        self._learn({word: count for word, count in whole.items() if word not in self._has_learned})
        return [word for word in words if word in broken or not self._has_learned.get(word, True)]

    def corrections(
        self, words: Mapping[str, Sequence[str]], unknown: Collection[str]
    ) -> dict[str, str]:
        """Return what misspelt words (of `TokenBatch.words`) may mean, in words the model knows.

        A word is taken for misspelt if it is one of those `unknown` to the model, or if its
        tokenizer knows it in pieces only and the grammar does not know it: CLIP was trained on
        every piece.
        """
        found = {
            word: near
            for word, tokens in words.items()
            if (word in unknown or len(tokens) > 1) and (near := correction(word)) is not None
        }
        found = {word: PERSON_PLURALS.get(near, near) for word, near in found.items()}
        if not found:
            return {}
        meant = self._encoder.tokenizer.encode([" ".join(found.values())]).words(0)
        not_better = {*self.unknown(meant)}
        return {word: near for word, near in found.items() if near not in not_better}

    def _learn(self, words: dict[str, int]) -> None:
        """Compare words of so many tokens with the untrained word."""
        untrained = self._untrained
        if untrained is None or not words:
            return
        lengths = sorted(set(words.values()))
        others = [" ".join([untrained] * length) for length in lengths]
        # All at once: a tower may compute a little otherwise in another batch.
        embeds_ND = self._encoder.encode_texts([*others, *words])
        for (word, length), own_D in zip(words.items(), embeds_ND[len(others) :], strict=True):
            apart = np.linalg.norm(own_D - embeds_ND[lengths.index(length)])
            self._has_learned[word] = bool(apart > _SAME)

    @cached_property
    def _untrained(self) -> str | None:
        """A word that the model has not learned, as it embeds it like another; None without any."""
        tokenizer = self._encoder.tokenizer
        words = tokenizer.encode([" ".join(_OFF_TOPIC)]).words(0)
        single = [
            word
            for word, tokens in words.items()
            if len(tokens) == 1 and not tokenizer.is_broken(tokens)
        ]
        if len(single) < 2:
            return None
        embeds_ND = self._encoder.encode_texts(single)
        apart_NN = np.linalg.norm(embeds_ND[:, None] - embeds_ND[None], axis=-1)
        alike_N = (apart_NN < _SAME).sum(axis=1)
        return single[int(alike_N.argmax())] if alike_N.max() > 1 else None


# --- Query embeddings

_KEPT_SENTENCES = 2000


@dataclass(frozen=True, kw_only=True)
class QuerySentence:
    """A sentence as the grammar and the text tower read it."""

    parsed: ParsedSentence
    vectors_AD: NDArray[np.float32]
    """(A, D) of what it wants, without excluded phrases, of unit length: one for each of its
    `ParsedSentence.readings`."""
    words: Mapping[str, Sequence[str]]
    """Its words with their tokens, see `TokenBatch.words`."""
    token_count: int
    """Tokens of what it wants, without the special ones; the context's at most."""
    is_truncated: bool
    """Whether it was longer than the model's context, and its end was cut off."""


@dataclass(frozen=True, kw_only=True)
class EmbeddedQuery:
    """What a gallery is searched with."""

    vectors_AD: NDArray[np.float32]
    """(A, D) of unit length, one for each reading of the sentence; the best one counts."""
    picture_share: float
    """Weight of pictures in it, 0 for a sentence to 1 for a picture; feedback is pictures, too."""
    sentence: QuerySentence | None
    is_sentence_only: bool
    """Whether its embedding comes from words, moved by feedback at most."""

    @property
    def is_sentence(self) -> bool:
        """Whether it is the sentence's own embedding, without a picture or feedback."""
        return self.sentence is not None and np.array_equal(
            self.vectors_AD, self.sentence.vectors_AD
        )

    @property
    def excluded(self) -> tuple[Phrase, ...]:
        """What the sentence excludes."""
        return () if self.sentence is None else self.sentence.parsed.excluded


class QueryEncoder:
    """Embeds requests for any number of galleries, and keeps sentences and words. Thread-safe."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.evidence = Evidence(encoder.encode_texts)
        self.vocabulary = Vocabulary(encoder)
        self._kept: OrderedDict[tuple[str, int], QuerySentence] = OrderedDict()
        self._background_SD: NDArray[np.float32] | None = None
        self._lock = threading.Lock()

    def embed(self, requests: Sequence[SearchRequest]) -> list[EmbeddedQuery]:
        """Embed requests; each tower runs once, and only if it is needed."""
        sentences = self._sentences(
            [(one.sentence, one.paraphrases) for one in requests if one.sentence is not None]
        )
        own = [
            None if one.sentence is None else sentences[one.sentence, one.paraphrases]
            for one in requests
        ]
        return list(map(_combined, requests, own, self._pictures(requests)))

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
        parsed = [parse_query(sentence) for sentence, _ in new]
        wordings = [
            [paraphrases(parse(text), count) for text in one.readings]
            if len(one.readings) > 1
            else [paraphrases(one, count)]
            for one, (_, count) in zip(parsed, new, strict=True)
        ]
        texts = [text for own in wordings for reading in own for text in reading]
        tokens = self.encoder.tokenizer.encode(texts)
        all_TD = self.encoder.encode_tokens(tokens)
        truncated, lengths = frozenset(tokens.truncated), token_lengths(tokens.input_ids)
        first = 0
        for key, one, own in zip(new, parsed, wordings, strict=True):
            starts = first + np.cumsum([0, *map(len, own)])
            means_AD = np.stack([all_TD[i:j].mean(axis=0) for i, j in pairwise(starts)])
            found[key] = QuerySentence(
                parsed=one,
                vectors_AD=means_AD / np.linalg.norm(means_AD, axis=1, keepdims=True),
                words={word: its for at in starts[:-1] for word, its in tokens.words(at).items()},
                token_count=int(lengths[first]) - 2,
                is_truncated=first in truncated,
            )
            first = starts[-1]
        with self._lock:
            self._kept |= {key: found[key] for key in new}
            while len(self._kept) > _KEPT_SENTENCES:
                self._kept.popitem(last=False)
        return found

    def _pictures(self, requests: Sequence[SearchRequest]) -> list[NDArray[np.float32] | None]:
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
    request: SearchRequest, sentence: QuerySentence | None, picture_D: NDArray[np.float32] | None
) -> EmbeddedQuery:
    share = 0.0 if picture_D is None else 1.0
    if sentence is not None and picture_D is not None:
        share = request.picture_share
        mixed_AD = (1 - share) * sentence.vectors_AD + share * picture_D
        lengths_A = np.linalg.norm(mixed_AD, axis=1, keepdims=True)
        if not lengths_A.all():
            raise IntegrityError(
                "sentence and picture cancel each other out: choose another picture_share"
            )
        queries_AD = (mixed_AD / lengths_A).astype(np.float32)
    elif sentence is not None:
        queries_AD = sentence.vectors_AD
    elif picture_D is not None:
        queries_AD = picture_D[None]
    relevant = 0 if request.relevant_ND is None else len(request.relevant_ND)
    return EmbeddedQuery(
        vectors_AD=np.stack(
            [refine(one, request.relevant_ND, request.not_relevant_ND) for one in queries_AD]
        ),
        picture_share=1 - (1 - share) * (1 - share_of_relevant(relevant)),
        sentence=sentence,
        is_sentence_only=picture_D is None,
    )
