"""Evidence for a match: features of a picture for a sentence, and of a search's candidates.

Neighbours among the candidates, mostly other pictures of the same person, are weighed in: what one
picture hides another shows.

Shapes: N candidates, T texts, D dimensions, F features.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import ParsedSentence, parse
from upperson_phrases.changes import one_word_changes
from upperson_phrases.evidence import EmbedTexts, Evidence, weighable
from upperson_rt.logistic import log_odds
from upperson_rt.score_calibration import Background, ScoreCalibration
from upperson_rt.search.background import BACKGROUND_SENTENCES
from upperson_rt.search.query import QuerySentence

CANDIDATES = 200
"""Best pictures of a search, among which neighbours are found."""
COMPARED = 40
"""Best pictures whose features count for the whole answer."""
_NEIGHBOUR_WIDTH = 0.02
"""Distance of cosines by which the weight of a neighbour falls to 1/e."""
_TEMPERATURE = 0.02
"""Of the softmax over changed sentences, that of training."""
_MOST_PHRASES, _MOST_CHANGES = 16, 128
_MOST_MARGIN = 8.0
_MOST_LOG_ODDS = 10.0
_SAMPLES = ("woman in red coat", "a man in a black jacket and blue jeans with a backpack")
_STALE = 0.25
"""Standard deviations of a feature; the demo's towers in int8 differ from those in fp32 by 0.08."""


def smoothed(
    vectors_ND: NDArray[np.float32], pool_MD: NDArray[np.float32], within: int | None = None
) -> NDArray[np.float32]:
    """Return (N, D) vectors of unit length, each averaged with its neighbours in (M, D).

    The first ``within`` ones, by default all, are in the pool: each is its own nearest neighbour.
    """
    weights_NM = np.exp((vectors_ND @ pool_MD.T - 1) / _NEIGHBOUR_WIDTH)
    means_ND = weights_NM @ pool_MD
    if within is not None:
        means_ND[within:] += vectors_ND[within:]
    means_ND /= np.linalg.norm(means_ND, axis=1, keepdims=True)
    found: NDArray[np.float32] = means_ND.astype(np.float32)
    return found


class SentenceFeatures:
    """Features of pictures for one reading of a sentence."""

    def __init__(
        self, parsed: ParsedSentence, vector_D: NDArray[np.float32], evidence: Evidence
    ) -> None:
        """``vector_D`` is the embedding that the sentence is searched with."""
        self._vector_D = vector_D
        self._evidence = evidence
        phrases = [phrase for phrase in weighable(parsed) if not phrase.negated]
        self._phrases = phrases[:_MOST_PHRASES]
        self._people = sum(phrase.kind == "person" for phrase in self._phrases)
        changed = one_word_changes(parsed)[:_MOST_CHANGES]
        self._changed_TD = evidence.texts(changed) if changed else vector_D[None][:0]

    @property
    def was_fitted(self) -> bool:
        """Whether all of its phrases are of the kinds that short sentences were fitted with."""
        return all(phrase.kind in ("person", "upper", "lower") for phrase in self._phrases)

    @property
    def says_something(self) -> bool:
        """Whether a phrase was understood that pictures can differ by."""
        return any(phrase.kind != "other" for phrase in self._phrases)

    def of_pictures(
        self,
        vectors_ND: NDArray[np.float32],
        pool_MD: NDArray[np.float32] | None,
        background: Background,
        searched: int,
        within: int | None = None,
    ) -> NDArray[np.float64]:
        """Return (N, 12) features; ``searched`` is how many pictures the pool is the best of.

        Without a pool no picture has neighbours. For ``within`` see `smoothed`.
        """
        near_ND = vectors_ND if pool_MD is None else smoothed(vectors_ND, pool_MD, within)
        own_N = (vectors_ND @ self._vector_D - background.middle) / background.spread
        near_N = near_ND @ self._vector_D
        person_N, clothes_N = np.zeros(len(own_N)), np.full(len(own_N), _MOST_LOG_ODDS)
        log_all_N = np.zeros(len(own_N))
        for phrase in self._phrases:
            evidence_N = self._evidence.of(phrase, near_ND).astype(np.float64)
            log_all_N += np.log(np.clip(evidence_N, 1e-9, 1))
            if phrase.kind == "person":
                person_N += _log_odds(evidence_N)
            else:
                clothes_N = np.minimum(clothes_N, _log_odds(evidence_N))
        if len(self._phrases) == self._people:
            clothes_N[:] = 0
        margin_N, share_N = np.zeros(len(own_N)), np.full(len(own_N), 0.5)
        if len(self._changed_TD):
            changed_NT = near_ND @ self._changed_TD.T
            margin_N = (near_N - changed_NT.max(axis=1)) / _TEMPERATURE
            over_N = np.exp((changed_NT - near_N[:, None]).astype(np.float64) / _TEMPERATURE)
            share_N = 1 / (1 + over_N.sum(axis=1))
        columns = [
            own_N,
            (near_N - background.middle) / background.spread,
            _log_odds(np.exp(log_all_N)),
            clothes_N,
            np.clip(margin_N, -_MOST_MARGIN, _MOST_MARGIN),
            _log_odds(share_N),
            person_N,
            *(np.full(len(own_N), value) for value in self._of_words()),
            np.full(len(own_N), np.log(searched)),
        ]
        return np.stack(columns, axis=1).astype(np.float64)

    def of_answer(
        self, features_NF: NDArray[np.float64], log_odds_N: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return (14,) features of the candidates together, N of them, best score first."""
        best_N = np.sort(log_odds_N)[::-1]
        likely_N = 1 / (1 + np.exp(-best_N))
        none = float(np.log1p(-np.clip(likely_N, 0, 1 - 1e-9)).sum())
        parts = [
            best_N[0],
            best_N[1:4].mean() if len(best_N) > 1 else best_N[0],
            best_N[4:12].mean() if len(best_N) > 4 else best_N[-1],
            np.log(likely_N.sum() + 1e-4),
            max(none, -6.0),
            features_NF[0, 1],
            features_NF[:, 1].max(),
            features_NF[:5, 0].mean(),
            features_NF[:, 4].max(),
            features_NF[:, 5].max(),
            *self._of_words()[:3],
            features_NF[0, -1],
        ]
        return np.array(parts, np.float64)

    def _of_words(self) -> Sequence[float]:
        things = len(self._phrases) - self._people
        changes = np.log1p(len(self._changed_TD))
        return [np.log1p(len(self._phrases)), changes, float(things <= 1), float(self._people)]


def sample_features(evidence: Evidence, background: Background) -> list[float]:
    """Return mean features of background sentences, as if they were pictures, for two sentences.

    They differ from those of a fit if sentences are read or weighed by other rules since.
    """
    pool_ND = evidence.texts(BACKGROUND_SENTENCES)
    tables = [
        SentenceFeatures(parse(one), evidence.texts([one])[0], evidence).of_pictures(
            pool_ND, pool_ND, background, len(pool_ND)
        )
        for one in _SAMPLES
    ]
    return [float(mean) for table_NF in tables for mean in table_NF.mean(axis=0)]


def is_stale(calibration: ScoreCalibration, embed_texts: EmbedTexts) -> bool:
    """Whether features are no longer those that a calibration was fitted on.

    Older calibrations have no sample to compare: they are not called stale.
    """
    fitted = calibration.fitted_on.get("sample")
    if fitted is None:
        return False
    now = sample_features(Evidence(embed_texts), calibration.background)
    scales = calibration.picture.scale * len(_SAMPLES)
    return not (
        isinstance(fitted, list)
        and len(fitted) == len(now)
        and all(isinstance(one, int | float) for one in fitted)
        and all(abs(a - b) < _STALE * s for a, b, s in zip(now, fitted, scales, strict=True))
    )


def _log_odds(share_N: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.clip(log_odds(share_N), -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
    return found


def sentence_features(sentence: QuerySentence, evidence: Evidence) -> tuple[SentenceFeatures, ...]:
    """Return the features of each reading; none if one has no phrase that was understood."""
    features = tuple(
        SentenceFeatures(parse(text), vector_D, evidence)
        for text, vector_D in zip(sentence.parsed.readings, sentence.vectors_AD, strict=True)
    )
    return features if all(one.says_something for one in features) else ()
