"""Background scores: how far a cosine stands above those of ordinary queries.

A cosine says little by itself: every search has a best hit, and the best of more pictures is
better. It says more beside the scores that background queries of the same kind get: background
sentences, pictures of other people, or both in the same shares.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import ParsedSentence
from upperson_rt.gallery import Gallery

_COLOURS = ("red", "blue", "black", "white", "green", "grey", "yellow", "brown")
_UPPER = ("coat", "jacket", "shirt", "hoodie", "dress", "sweater", "top", "t-shirt")
_LOWER = ("black trousers", "blue jeans", "grey shorts", "a white skirt")
_PEOPLE = ("a woman", "a man", "a girl", "a boy")
BACKGROUND_SENTENCES = tuple(
    f"{_PEOPLE[n % 4]} in a {_COLOURS[(5 * n + n // 8) % 8]} {_UPPER[(n + n // 8) % 8]} and "
    f"{_LOWER[n // 2 % 4]}"
    for n in range(32)
)
"""Sentences whose scores other sentences are compared with."""
_SAMPLE = 2048
_LEAST = 50
"""From this many people on a gallery shows by itself how similar people are."""
_COMPARED = 512
_QUERIES = 64
_FEWEST_SCORES = 16
_SMALLEST_SPREAD = 0.01
_GROWN = 1.1
_KEPT_S = 3600.0
"""A sample is read anew after this time, so that it does not keep deleted pictures."""
_INDISTINCT_BELOW = 0.45
"""Share of the spread that background sentences have: sentences about anything but people have
less."""


@dataclass
class _Sample:
    vectors_ND: NDArray[np.float32]
    people_N: NDArray[np.int64]
    """A number for each person, as far as tracks distinguish them."""
    count: int
    """How many pictures the gallery had."""
    read_s: float
    usual: dict[float, tuple[float, float] | None] = field(default_factory=dict)
    """By picture share: middle and spread of the scores of background queries."""
    usual_spread: float | None = None
    """Median spread of the scores of one background sentence over pictures."""


class BackgroundScores:
    """Background scores of one gallery. Safe to use from several threads."""

    def __init__(
        self,
        gallery: Gallery,
        background_KD: NDArray[np.float32],
        sentences: Callable[[], NDArray[np.float32]],
    ) -> None:
        """Compare scores of a gallery, of which a sample is read when it is first needed.

        ``background_KD`` are pictures of people who are not in it: a small gallery does not show
        how similar different people are. ``sentences`` embeds `BACKGROUND_SENTENCES`.
        """
        self._gallery = gallery
        norms = np.linalg.norm(background_KD, axis=1, keepdims=True)
        self._background_KD = background_KD / np.maximum(norms, 1e-12)
        self._sentences = sentences
        self._lock = threading.Lock()
        self._read: _Sample | None = None

    def refresh(self) -> None:
        """Read a new sample if the gallery has outgrown the last one; counts the gallery once."""
        with self._lock:
            before = self._read
            is_old = before is not None and time.monotonic() - before.read_s > _KEPT_S
            if before is not None and len(before.vectors_ND) >= _SAMPLE and not is_old:
                return
            count = self._gallery.count()
            if before is None or is_old or _is_outgrown(before.count, count):
                self._read = self._new_sample(count)

    def deviations(
        self, picture_share: float, scores: Sequence[float]
    ) -> NDArray[np.float64] | None:
        """Return (N,) standard deviations above background scores, None without any.

        ``picture_share`` is the weight of pictures in the query, 0 for a sentence to 1 for a
        picture.
        """
        usual = self._usual(round(picture_share, 2)) if len(scores) else None
        if usual is None:
            return None
        middle, spread = usual
        above_N: NDArray[np.float64] = (np.asarray(scores, np.float64) - middle) / spread
        return above_N

    def is_indistinct(self, sentence: ParsedSentence, vector_D: NDArray[np.float32]) -> bool:
        """Whether a sentence's scores are almost equal for all pictures."""
        if not is_vague(sentence) or len((sample := self._sample()).vectors_ND) < _LEAST:
            return False
        if sample.usual_spread is None:
            spreads_S = (sample.vectors_ND @ self._sentences().T).std(axis=0)
            sample.usual_spread = float(np.median(spreads_S))
        spread = float((sample.vectors_ND @ vector_D).std())
        return spread < _INDISTINCT_BELOW * sample.usual_spread

    def _usual(self, share: float) -> tuple[float, float] | None:
        sample = self._sample()
        if share not in sample.usual:
            sample.usual[share] = self._measured(sample, share)
        return sample.usual[share]

    def _measured(self, sample: _Sample, share: float) -> tuple[float, float] | None:
        some = _spread(len(sample.vectors_ND), _COMPARED)
        pictures_ND, people_N = sample.vectors_ND[some], sample.people_N[some]
        chosen = _spread(len(some), _QUERIES)
        if share and len(np.unique(people_N)) < _LEAST:
            chosen = len(some) + np.arange(len(self._background_KD))
            pictures_ND = np.concatenate([pictures_ND, self._background_KD])
            people_N = np.concatenate([people_N, -1 - np.arange(len(self._background_KD))])
        if 0 < share < 1:
            chosen = chosen[np.arange(_QUERIES) % len(chosen)]
        scores_QN = self._queries(share, pictures_ND[chosen]) @ pictures_ND.T
        of_others = np.ones(scores_QN.shape, np.bool_)
        if share:
            of_others = people_N[chosen][:, None] != people_N[None]
        scores = scores_QN[of_others]
        if len(scores) < _FEWEST_SCORES:
            return None
        return scale_of(scores)

    def _queries(self, share: float, pictures_QD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (Q, D) background queries: sentences, pictures, or both in the same shares."""
        if share == 1:
            return pictures_QD
        sentences_SD = self._sentences()
        if share == 0:
            return sentences_SD
        texts_QD = sentences_SD[np.arange(len(pictures_QD)) % len(sentences_SD)]
        mixed_QD = (1 - share) * texts_QD + share * pictures_QD
        mixed_QD /= np.linalg.norm(mixed_QD, axis=1, keepdims=True)
        return mixed_QD

    def _sample(self) -> _Sample:
        if self._read is None:
            self.refresh()
        assert self._read is not None
        return self._read

    def _new_sample(self, count: int) -> _Sample:
        items, vectors_ND = next(
            self._gallery.vectors(batch_size=_SAMPLE),
            ([], np.empty((0, self._gallery.embed_dim), np.float32)),
        )
        people: dict[object, int] = {}
        tracks = [item.key if item.track is None else (item.camera, item.track) for item in items]
        numbers = [people.setdefault(track, len(people)) for track in tracks]
        return _Sample(vectors_ND, np.array(numbers, np.int64), count, time.monotonic())


def scale_of(scores: NDArray[np.float32]) -> tuple[float, float]:
    """Return middle and spread of background scores (any shape), at least 16 of them."""
    # From the lower half: in the upper one may be the same person in another track.
    low, middle = np.quantile(scores, [0.1587, 0.5])
    return float(middle), max(float(middle - low), _SMALLEST_SPREAD)


def is_vague(sentence: ParsedSentence) -> bool:
    """Whether a sentence names no garment, colour, woman or the like."""
    return all(phrase.noun == "person" and not phrase.colours for phrase in sentence.understood)


def _is_outgrown(before: int, now: int) -> bool:
    fewer, more = sorted((before, now))
    return more > fewer if more < _LEAST else more > _GROWN * fewer


def _spread(count: int, most: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, max(0, count - 1), min(count, most)).astype(np.int64))
