"""Verdicts: how likely hits match, and whether any picture of the gallery does.

Shapes: N pictures, D dimensions, A readings of a sentence.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import Phrase
from upperson_phrases.evidence import MOST_EXCLUDED, Evidence
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Hit
from upperson_rt.logistic import probability
from upperson_rt.printable import count_of, safe_repr, show_percent
from upperson_rt.score_calibration import LIKELY, MatchLabel, ScoreCalibration
from upperson_rt.search.background import BackgroundScores
from upperson_rt.search.features import (
    CANDIDATES,
    COMPARED,
    SentenceFeatures,
    sentence_features,
    smoothed,
)
from upperson_rt.search.notices import Notice
from upperson_rt.search.query import EmbeddedQuery
from upperson_rt.search.shift import FEWEST, NotCompared, ShiftCheck, is_night

VerdictWord: TypeAlias = Literal["likely", "possible", "nobody", "uncalibrated"]
_EXCLUDED_WEIGHT = 32.0
"""What log-odds lose at most for an excluded phrase. With 16 likelihoods of such hits are exact on
average, but one in five of the first ten shows what is excluded; so they are too low instead."""
_MANY = 5.0
"""Pictures that match, on average. Of queries that the calibration was checked on (sets 401 to 412)
one in seventy is affected, with and without a match."""
_STILL_LIKELY = 0.05
"""Likelihood of one of the last pictures that were compared, from which there are more."""
Candidates: TypeAlias = tuple[Sequence[Hit], NDArray[np.float32]]
"""The best pictures of a search, and their (N, D) embeddings."""
Reason: TypeAlias = Literal[
    "no_calibration",
    "few_pictures",
    "pictures_unlike",
    "cameras_not_compared",
    "sentence_vague",
    "sentence_truncated",
    "words_unknown",
    "words_unread",
    "exclusion_uncertain",
    "nothing_searched",
]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether any of the pictures that were searched matches."""

    word: VerdictWord
    likelihood: float | None
    """0 to 1, that some picture matches; None where scores are not calibrated."""
    expected: float | None
    """Number of pictures that match, on average over such answers; None where scores are not
    calibrated, or the sentence has phrases of a kind that was not fitted in short sentences."""
    is_more: bool = False
    """Whether there are probably more than ``expected``: only the best pictures were compared."""
    reason: Reason | None = None
    """Why it is ``uncalibrated``."""
    fields: dict[str, Any] = field(default_factory=dict)
    """JSON values that belong to the reason."""

    @property
    def text(self) -> str:
        """What it says in one line, without a full stop."""
        if self.likelihood is None:
            why = "" if self.reason is None else _REASONS[self.reason](self.fields)
            return f"uncalibrated: {why}"
        percent = show_percent(self.likelihood)
        if self.word == "nobody":
            return f"nobody ({percent}): probably no picture matches"
        if self.expected is None or self.expected < 1:
            return f"{self.word} ({percent})"
        count = count_of(round(self.expected), "picture")
        more = "more than" if self.is_more else "about"
        return f"{self.word} ({percent}): {more} {count} match{'es' * (count == '1 picture')}"

    def without_repeated(self, notices: Sequence[Notice]) -> list[Notice]:
        """Return the notices of the same search that its text does not repeat."""
        return [one for one in notices if not self._repeats(one)]

    def _repeats(self, notice: Notice) -> bool:
        if notice.code != self.reason:
            return False
        words = notice.fields.get("words")
        of_verdict = self.fields.get("words", ())
        return notice.fields == self.fields or (words is not None and {*words} <= {*of_verdict})

    def for_log(self) -> dict[str, Any]:
        """Return what a query log keeps of it."""
        likelihood = {} if self.likelihood is None else {"likelihood": round(self.likelihood, 4)}
        return {"verdict": self.word, **likelihood}

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {
            "word": self.word,
            "text": self.text,
            "likelihood": self.likelihood and round(self.likelihood, 4),
            "expected_matches": self.expected and round(self.expected, 2),
            "expected_is_more": self.is_more,
            "reason": self.reason,
            "fields": self.fields,
        }


def _pictures_unlike(fields: Mapping[str, Any]) -> str:
    names = [name for name in fields["cameras"] if name]
    where = f" of {', '.join(map(safe_repr, names[:_MOST_NAMED]))}" if names else ""
    return (
        f"the pictures{where}{' at night' if fields['at_night'] else ''} do not look like those "
        "that scores were calibrated on; calibrate with  upperson-rt calibrate --annotations FILE"
    )


_MOST_NAMED = 3
_REASONS: Mapping[Reason, Callable[[Mapping[str, Any]], str]] = {
    "no_calibration": lambda _: (
        "scores of this bundle are not calibrated, so they do not say whether any picture matches: "
        "look at the hits, or calibrate, see  upperson-rt calibrate --help"
    ),
    "few_pictures": lambda f: f"{f['pictures']} pictures are too few, {f['least']} are needed",
    "pictures_unlike": _pictures_unlike,
    "cameras_not_compared": lambda f: (
        f"no picture is likely to match, but most are of cameras with too few pictures to be "
        f"compared with the score calibration ({f['wanted']} by day or by night are needed)"
    ),
    "sentence_vague": lambda _: (
        "the sentence names no known garment or kind of person, such as a red coat or a woman"
    ),
    "sentence_truncated": lambda _: "the sentence is longer than the model reads",
    "words_unknown": lambda f: Notice("words_unknown", f).text,
    "words_unread": lambda f: Notice("words_unread", f).text,
    "exclusion_uncertain": lambda _: (
        "no picture is likely to match, but that was not calibrated for sentences that exclude "
        "something: look at the hits"
    ),
    "nothing_searched": lambda _: "no picture passes the filter",
}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Likelihoods of a search."""

    likelihoods: list[float | None]
    """One a hit, 0 to 1, at most the verdict's; None where its label is empty."""
    labels: list[MatchLabel]
    """One a hit."""
    order: list[float | None]
    """By which hits come, one a hit: likelihoods before that limit, None where none is known."""
    verdict: Verdict
    not_compared: NotCompared | None = None
    """Where the verdict is ``nobody``: pictures of which it is not known whether that holds."""


class Judge:
    """Judges searches of one gallery. Safe to use from several threads."""

    def __init__(
        self,
        gallery: Gallery,
        background: BackgroundScores,
        evidence: Evidence,
        calibration: ScoreCalibration | None,
    ) -> None:
        if calibration is not None and len(calibration.reference.mean) != gallery.embed_dim:
            raise InputError(
                f"the score calibration is of {len(calibration.reference.mean)} dimensions, the "
                f"gallery has {gallery.embed_dim}: calibrate again",
                code="axes_unfit",
            )
        self.calibration = calibration
        self._gallery = gallery
        self._background = background
        self._evidence = evidence
        self.shift = None if calibration is None else ShiftCheck(gallery, calibration.reference)

    def judge(
        self,
        query: EmbeddedQuery,
        where: Filter | None,
        hits: Sequence[Hit],
        unknown: Sequence[str] = (),
        vectors: Mapping[int, NDArray[np.float32]] | None = None,
        candidates: Sequence[Candidates] = (),
    ) -> Judged:
        """Return likelihoods and labels of hits, and the verdict on all pictures that pass.

        Args:
            query: What was searched with.
            where: Which pictures pass.
            hits: To be judged.
            unknown: Words of the sentence that the model does not know: the rest may match, the
                whole cannot be judged.
            vectors: (D,) by `Hit.id`; those of the gallery by default.
            candidates: The `CANDIDATES` best pictures, of each reading of the sentence; searched
                for by default.
        """
        if self.calibration is None or self.shift is None:
            return self._uncalibrated(hits, "no_calibration")
        if not hits:
            return self._uncalibrated(hits, "nothing_searched")
        if (count := self._gallery.count()) < FEWEST:
            few = {"pictures": count, "least": FEWEST}
            return self._uncalibrated(hits, "few_pictures", few)
        if query.sentence is not None and (unread := query.sentence.parsed.unread):
            return self._uncalibrated(hits, "words_unread", {"words": [*unread]})
        if unknown:
            return self._uncalibrated(hits, "words_unknown", {"words": [*unknown]})
        cameras = None if where is None else where.cameras
        shifted = self.shift.shifted(None if cameras is None else tuple(cameras))
        unlike = {(group.camera, group.is_night) for group in shifted}
        searched = count if where is None or where.is_empty else self._gallery.count(where)
        if query.sentence is None or query.picture_share > 0:
            found = self._of_picture(query, where, hits)
        elif query.sentence.is_truncated:
            return self._uncalibrated(hits, "sentence_truncated")
        else:
            features = sentence_features(query.sentence, self._evidence)
            if not features:
                return self._uncalibrated(hits, "sentence_vague")
            own = self._gallery.vectors_of(hits) if vectors is None else vectors
            best = candidates or [
                self._gallery.search_with_vectors(vector_D, CANDIDATES, where, certain=COMPARED)
                for vector_D in query.sentence.vectors_AD
            ]
            found = _best(
                [
                    self._of_reading(one, reading, query.excluded, hits, own, unlike, searched)
                    for one, reading in zip(features, best, strict=True)
                ]
            )
        word = self._word(found)
        # The likeliest of many is overrated, and no picture is likelier than that there is one.
        likelihoods_N = np.minimum(found.likely_N, found.answer)
        labels = [
            "" if _group_of(hit) in unlike else self._label(word, float(one))
            for hit, one in zip(hits, likelihoods_N, strict=True)
        ]
        if unlike and ("" in labels or word == "nobody") and "likely" not in labels:
            names = sorted({name or "" for name, _ in unlike})
            fields = {"cameras": names, "at_night": any(group.is_night for group in shifted)}
            return self._uncalibrated(hits, "pictures_unlike", fields)
        if word == "nobody" and query.excluded:
            judged = self._uncalibrated(hits, "exclusion_uncertain")
            return replace(judged, order=found.likely_N.tolist())
        unsure = self.shift.not_compared(where, searched) if word == "nobody" else None
        # What a camera's pictures have in common may be why none of them is found.
        if unsure is not None and 2 * unsure.of_cameras > unsure.searched:
            return self._uncalibrated(hits, "cameras_not_compared", unsure.fields)
        verdict = Verdict(
            word=word,
            likelihood=found.answer,
            expected=found.expected,
            is_more=found.is_more,
        )
        likelihoods, order = (
            [one if label else None for one, label in zip(own_N.tolist(), labels, strict=True)]
            for own_N in (likelihoods_N, found.likely_N)
        )
        return Judged(
            likelihoods=likelihoods,
            labels=labels,
            order=order,
            verdict=verdict,
            not_compared=unsure,
        )

    def _word(self, found: "_Found") -> VerdictWord:
        """Return the verdict; a likely answer needs a picture that is possible at least."""
        assert self.calibration is not None
        limit = self.calibration.nobody_below
        if found.answer < limit:
            return "nobody"
        return "likely" if found.answer >= LIKELY and found.best >= limit else "possible"

    def _label(self, word: VerdictWord, likelihood: float) -> MatchLabel:
        assert self.calibration is not None
        return "unlikely" if word == "nobody" else self.calibration.label(likelihood)

    def _of_picture(
        self, query: EmbeddedQuery, where: Filter | None, hits: Sequence[Hit]
    ) -> "_Found":
        """Judge a query with a picture by the scores of the best pictures alone."""
        likely_N = self._by_deviation(query, hits)
        (best,) = self._gallery.search(query.vectors_AD[:1], CANDIDATES, where)
        best_M = self._by_deviation(query, best)
        highest = float(max(best_M.max(initial=0.0), likely_N.max()))
        return _Found(likely_N, highest, highest, float(best_M.sum()), _goes_on(best_M))

    def judge_picture(
        self,
        query: EmbeddedQuery,
        where: Filter | None,
        hit: Hit,
        vector_D: NDArray[np.float32],
        unknown: Sequence[str],
    ) -> tuple[float | None, MatchLabel]:
        """Return likelihood and label of one picture with this (D,) embedding, see `judge`."""
        judged = self.judge(query, where, [hit], unknown, {hit.id: vector_D})
        return judged.likelihoods[0], judged.labels[0]

    def _uncalibrated(
        self,
        hits: Sequence[Hit],
        reason: Reason,
        fields: dict[str, Any] | None = None,
    ) -> Judged:
        verdict = Verdict(
            word="uncalibrated", likelihood=None, expected=None, reason=reason, fields=fields or {}
        )
        count = len(hits)
        return Judged(
            likelihoods=[None] * count, labels=[""] * count, order=[None] * count, verdict=verdict
        )

    def _by_deviation(self, query: EmbeddedQuery, hits: Sequence[Hit]) -> NDArray[np.float64]:
        """Return (N,) likelihoods by scores alone; the cosine from 0 to 1 without a background."""
        assert self.calibration is not None
        scores = [hit.score for hit in hits]
        self._background.refresh()
        deviations_N = self._background.deviations(query.picture_share, scores)
        if deviations_N is None:
            return np.clip((np.array(scores, np.float64) + 1) / 2, 0, 1)
        return self.calibration.likelihoods(query.picture_share, deviations_N)

    def _of_reading(
        self,
        features: SentenceFeatures,
        candidates: Candidates,
        excluded: Sequence[Phrase],
        hits: Sequence[Hit],
        own: Mapping[int, NDArray[np.float32]],
        unlike: set[tuple[str | None, bool]],
        searched: int,
    ) -> "_Found":
        """Judge the best pictures for one reading of a sentence, and the hits."""
        assert self.calibration is not None
        found, found_ND = candidates
        kept = [row for row, hit in enumerate(found) if _group_of(hit) not in unlike]
        there = {found[row].id for row in kept}
        more = [hit for hit in hits if hit.id in own and hit.id not in there]
        if not kept and not more:
            return _Found(np.zeros(len(hits)), 0.0, 0.0, 0.0, False)
        pool_MD = found_ND[kept]
        vectors_ND = np.concatenate([pool_MD, *(own[hit.id][None] for hit in more)])
        lost_N = None
        if excluded:
            near_ND = smoothed(vectors_ND, pool_MD, len(pool_MD))
            lost_N = self._evidence.against(excluded, near_ND) * (_EXCLUDED_WEIGHT / MOST_EXCLUDED)
        # Neighbours are candidates, so that likelihoods do not depend on the number of hits.
        likely_N, answer = judge_sentence(
            self.calibration,
            features,
            vectors_ND,
            pool_MD,
            min(COMPARED, len(kept)),
            searched,
            lost_N,
        )
        ids = [*(found[row].id for row in kept), *(hit.id for hit in more)]
        likely = dict(zip(ids, likely_N.tolist(), strict=True))
        best_M = likely_N[: len(kept)]
        best = float((best_M if kept else likely_N).max())
        counts = features.was_fitted
        return _Found(
            likely_N=np.array([likely.get(hit.id, 0.0) for hit in hits]),
            answer=answer if kept else best,
            best=best,
            expected=float(best_M.sum()) if counts else None,
            is_more=counts and searched > len(found) and _goes_on(best_M),
        )


@dataclass(frozen=True)
class _Found:
    """What was computed of the best pictures of a search."""

    likely_N: NDArray[np.float64]
    """Of the hits."""
    answer: float
    best: float
    """Highest likelihood of a picture."""
    expected: float | None
    is_more: bool


def _best(readings: Sequence[_Found]) -> _Found:
    """Return the better of each: a picture needs to match one reading only."""
    counts = [one.expected for one in readings if one.expected is not None]
    return _Found(
        likely_N=np.max([one.likely_N for one in readings], axis=0),
        answer=max(one.answer for one in readings),
        best=max(one.best for one in readings),
        expected=max(counts) if len(counts) == len(readings) else None,
        is_more=any(one.is_more for one in readings),
    )


def _goes_on(likely_M: NDArray[np.float64]) -> bool:
    """Whether pictures beyond the best (M,) probably match as well."""
    return len(likely_M) >= CANDIDATES and bool((likely_M[-20:] > _STILL_LIKELY).any())


def _group_of(hit: Hit) -> tuple[str | None, bool]:
    return hit.item.camera, is_night(hit.item)


def judge_sentence(
    calibration: ScoreCalibration,
    features: SentenceFeatures,
    vectors_ND: NDArray[np.float32],
    pool_MD: NDArray[np.float32],
    compared: int,
    searched: int,
    lost_N: NDArray[np.floating[Any]] | None = None,
) -> tuple[NDArray[np.float64], float]:
    """Return (N,) likelihoods of pictures, and that of the answer.

    The first M of the pictures are the candidates ``pool_MD``, best score first, among which all
    have their neighbours. The answer is judged by the first ``compared`` ones, the best of
    ``searched`` pictures. Log-odds lose ``lost_N`` (N,) for what a sentence excludes.
    """
    background = calibration.background
    features_NF = features.of_pictures(vectors_ND, pool_MD, background, searched, len(pool_MD))
    log_odds_N = calibration.picture.log_odds(features_NF)
    if lost_N is not None:
        log_odds_N = log_odds_N - lost_N
    likely_N = probability(log_odds_N)
    if not compared:
        return likely_N, 0.0
    together = features.of_answer(features_NF[:compared], log_odds_N[:compared])
    (answer,) = probability(calibration.answer.log_odds(together[None]))
    return likely_N, likelihood_of_any(float(answer), likely_N[: len(pool_MD)])


def likelihood_of_any(answer: float, likely_N: NDArray[np.float64]) -> float:
    """Return the likelihood that some picture matches, from that of the answer as a whole.

    Sentences that many pictures match, such as *woman without a hat*, are unlike those that answers
    were fitted on: there the likeliest of the pictures (N,) counts as well.
    """
    return max(answer, float(likely_N.max())) if likely_N.sum() >= _MANY else answer
