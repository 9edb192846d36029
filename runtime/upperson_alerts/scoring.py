"""Scores of visits for sentences, as log-odds where scores are calibrated, else as cosines.

Shapes: N pictures, D dimensions, T texts of a sentence (its readings), S sentences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import Phrase
from upperson_phrases.evidence import Evidence
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.logistic import log_odds, probability
from upperson_rt.printable import get_logger
from upperson_rt.score_calibration import ScoreCalibration, calibration_in_use
from upperson_rt.search.features import SentenceFeatures, sentence_features
from upperson_rt.search.query import QueryEncoder, SearchRequest

_LOG = get_logger(__name__)

_COMPARED_FROM = 2.0
"""Standard deviations of background scores above which the log-odds of a cosine are computed: of
drawn people 3 to 10 % of the pictures, by sentence."""
_BELOW, _LEAST_LOG_ODDS = -32.0, -30.0
"""Below the lowest log-odds pictures are ordered by their cosines."""
_SEARCHED = 1000
"""Pictures that the log-odds suppose: they are compared with others of the same sentence only."""
_ENOUGH, _LOST_EACH = 4, 1.2
"""Pictures of a visit that are enough, and what its score loses for each that is missing: the mean
of few is less certain, and passes a threshold more often by chance. Fitted with `benchmarks.recall`
on sets 401 to 414."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SentenceScore:
    """How a sentence scores pictures."""

    texts_TD: NDArray[np.float32]
    """Of unit length."""
    excluded: tuple[Phrase, ...] = ()
    features: tuple[SentenceFeatures, ...] = ()
    """One for each text; empty for cosines alone."""


def scorer_of(queries: QueryEncoder, gallery: Gallery, sentences: Sequence[str]) -> "Scorer":
    """Return how sentences score pictures, as a search of the gallery does.

    A calibration of the gallery that cannot be used must not stop commits: that of the bundle is
    used, with a warning. Alerts keep their rates, as their thresholds come from the same scores.
    """
    own = queries.encoder
    try:
        calibration = calibration_in_use(gallery.location, own.calibration, own.fingerprint)
    except InputError as error:
        calibration = own.calibration
        _LOG.warning("alerts use the score calibration of the bundle: %s", error)
    found = queries.embed([SearchRequest(sentence=sentence) for sentence in sentences])
    scores = []
    for one in found:
        features: tuple[SentenceFeatures, ...] = ()
        if calibration is not None and one.sentence is not None:
            features = sentence_features(one.sentence, queries.evidence)
        scores.append(
            SentenceScore(texts_TD=one.vectors_AD, excluded=one.excluded, features=features)
        )
    return Scorer(scores, queries.evidence, calibration)


class Scorer:
    """Scores pictures for S sentences, at least one."""

    def __init__(
        self,
        sentences: Sequence[SentenceScore],
        evidence: Evidence,
        calibration: ScoreCalibration | None,
    ) -> None:
        counts = [len(one.texts_TD) for one in sentences]
        self._sentences = list(sentences)
        self._firsts = np.cumsum([0, *counts])[:-1]
        self._texts_TD = np.concatenate([one.texts_TD for one in sentences])
        self._evidence = evidence
        self._calibration = calibration

    def scores(
        self,
        images_ND: NDArray[np.float32],
        means_ND: NDArray[np.float32],
        counts_N: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """Return (N, S) scores of pictures, from all texts in one matrix product.

        Args:
            images_ND: The pictures, of unit length.
            means_ND: For each the mean of its visit's pictures up to it, of unit length. It counts
                where scores are calibrated, else the picture alone.
            counts_N: Pictures in that mean.
        """
        vectors_ND = images_ND if self._calibration is None else means_ND
        cosines_TN = self._texts_TD @ vectors_ND.T
        scores_SN: NDArray[np.float32] = np.maximum.reduceat(cosines_TN, self._firsts)
        for row, one in enumerate(self._sentences):
            if one.excluded:
                scores_SN[row] -= self._evidence.against(one.excluded, vectors_ND)
        if self._calibration is None:
            return scores_SN.T
        background = self._calibration.background
        scores_SN += _BELOW
        compared_TN = cosines_TN > background.middle + _COMPARED_FROM * background.spread
        compared_SN = np.logical_or.reduceat(compared_TN, self._firsts)
        for row in np.flatnonzero(compared_SN.any(axis=1)).tolist():
            if self._sentences[row].features:
                those = np.flatnonzero(compared_SN[row])
                scores_SN[row, those] = self._log_odds(self._sentences[row], vectors_ND[those])
        scores_SN -= _LOST_EACH * np.maximum(_ENOUGH - counts_N, 0)
        return scores_SN.T

    def _log_odds(
        self, sentence: SentenceScore, vectors_ND: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return (N,) log-odds that vectors match the reading of a sentence they match best."""
        assert self._calibration is not None
        picture, background = self._calibration.picture, self._calibration.background
        found_N: NDArray[np.float64] = np.max(
            [
                picture.log_odds(one.of_pictures(vectors_ND, None, background, _SEARCHED))
                for one in sentence.features
            ],
            axis=0,
        )
        if sentence.excluded:
            left_N = self._evidence.left(sentence.excluded, vectors_ND)
            found_N = log_odds(probability(found_N) * left_N, least=1e-12)
        return np.maximum(found_N, _LEAST_LOG_ODDS)
