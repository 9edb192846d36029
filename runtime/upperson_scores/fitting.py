"""Fits a `ScoreCalibration` on galleries of labelled pictures, and measures one on others.

Shapes: N pictures, D dimensions, Q queries, F features.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import upperson_rt
from upperson_phrases import parse
from upperson_phrases.evidence import EmbedTexts, Evidence
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.logistic import Logistic, probability
from upperson_rt.score_calibration import Background, Curve, Reference, ScoreCalibration
from upperson_rt.search.background import BACKGROUND_SENTENCES, scale_of
from upperson_rt.search.features import (
    CANDIDATES,
    COMPARED,
    SentenceFeatures,
    sample_features,
)
from upperson_rt.search.shift import LEAST
from upperson_rt.search.verdict import likelihood_of_any
from upperson_rt.strict import read_fields
from upperson_scores.labelled_queries import (
    KINDS,
    Kind,
    LabelledPictures,
    LabelledQuery,
    queries_about,
    traits_of,
)
from upperson_scores.logistic_fit import fit_logistic
from upperson_scores.metrics import auroc

FEWEST_PEOPLE = 20
"""With fewer nothing can be fitted."""
_PICTURE_RIDGE, _ANSWER_RIDGE = 10.0, 1.0
_PRIOR_PICTURE_RIDGE, _PRIOR_ANSWER_RIDGE = 5e5, 5e3
"""Divided by the people of a fit."""
_WRONG_NOBODY, _AIM = 0.01, 0.0075
"""Shares of the searches with a match that `nobody` is said of, on people left out of the fit: that
which is promised, and a quarter less, as other people differ."""
_MOST_NOBODY = 0.25
_NOBODY_CONFIDENCE = 0.8
"""One-sided, of the bootstrap of the limit of `nobody`. At 0.95 a fit of 50 people would report 40
instead of 66 % of the absences."""
_CAUTION_PEOPLE = 50
"""With as many the limit of `nobody` is halved."""
_LEAST_AUROC = 80.0
"""Of a fit that is worth using, in percent, on people left out of it."""
_AXES = 24
_GROUP_PEOPLE = 50
"""People on the pictures of a group that is compared, at least."""
_PARTS = (1, 2, 8)
"""One in so many people of a block is in each of its galleries."""
_DRAWS = 200
_SEED = 0
_MARGIN = 1.1
"""By how much pictures may be farther away than any group of the fit's own was."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledFiles:
    """Picture files of people of whom sentences are known to be true."""

    source: str
    """What reports call them, such as ``cuhk, val``."""
    files: Sequence[Path]
    people_N: NDArray[np.int64]
    cameras_N: NDArray[np.str_]
    """Empty where not known."""
    captions: Sequence[Sequence[str]]
    """Of each picture."""
    traits: Mapping[str, NDArray[np.str_]] | None = None
    """See `LabelledPictures`; None: what the captions say of them, see `traits_of`."""

    def embedded(self, vectors_ND: NDArray[np.float32]) -> LabelledPictures:
        """Return the pictures with their embeddings."""
        traits = self.traits
        return LabelledPictures(
            vectors_ND=vectors_ND,
            people_N=self.people_N,
            cameras_N=self.cameras_N,
            captions=self.captions,
            traits=traits_of(self.captions, self.people_N) if traits is None else traits,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Block:
    """People who are fitted on or checked on together, and queries about them."""

    galleries: Sequence[LabelledPictures]
    """The first one has all of its people."""
    queries: Sequence[LabelledQuery]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Search:
    """A query in a gallery: the best pictures, and which of the first `COMPARED` match."""

    kind: Kind
    features: SentenceFeatures
    pool_ND: NDArray[np.float32]
    right_N: NDArray[np.bool_]
    is_present: bool
    searched: int
    """Pictures of the gallery."""
    person: int | None
    """Whose caption the query is."""


def blocks_of(
    pictures: LabelledPictures, rng: np.random.Generator, people_of_block: int = 100
) -> list[Block]:
    """Divide people into two to four blocks, each with galleries of its own.

    Neighbours in the order of their numbers stay together: in some data sets they look alike.

    Raises:
        InputError: There are fewer than 20 people.
    """
    people = np.unique(pictures.people_N)
    if len(people) < FEWEST_PEOPLE:
        raise InputError(
            f"a calibration needs captions of at least {FEWEST_PEOPLE} people, found {len(people)}",
            code="too_few_people",
            found=len(people),
        )
    parts = np.array_split(people, min(4, max(2, len(people) // people_of_block)))
    rows = [np.flatnonzero(np.isin(pictures.people_N, part)) for part in parts]
    return [
        make_block(pictures.of(own), pictures.of(rows[(index + 1) % len(rows)]), rng)
        for index, own in enumerate(rows)
    ]


def make_block(own: LabelledPictures, others: LabelledPictures, rng: np.random.Generator) -> Block:
    """Make queries about people in galleries of all and of some of them; ``others`` are in none."""
    people = np.unique(own.people_N)
    galleries = [
        own.of(np.flatnonzero(np.isin(own.people_N, people[: max(2, len(people) // part)])))
        for part in _PARTS
    ]
    return Block(galleries=galleries, queries=queries_about(own, others, rng))


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Models that a fit stays close to, the closer the fewer people it has."""

    picture: Logistic
    answer: Logistic


def shipped_prior() -> Prior:
    """Return what was fitted on drawn people: `python -m benchmarks.scores` writes the file."""
    content = json.loads(files(__package__).joinpath("prior.json").read_text("utf-8"))
    return Prior(
        picture=read_fields(Logistic, content["picture"], "prior.json"),
        answer=read_fields(Logistic, content["answer"], "prior.json"),
    )


def calibrate(
    encoder: Encoder, people: LabelledFiles, progress: Callable[[str, int, int], None]
) -> ScoreCalibration:
    """Embed people's pictures, and fit on them, near the shipped prior.

    ``progress`` is called with what is being read, *pictures* or *sentences*, how many parts are
    done, and of how many.

    Raises:
        InputError: There are too few people, or likelihoods are not reliable.
    """
    vectors_ND = encoder.encode_images(list(people.files), progress=partial(progress, "pictures"))
    return fit_score_calibration(
        blocks_of(people.embedded(vectors_ND), np.random.default_rng(_SEED)),
        encoder.encode_texts,
        encoder.fingerprint,
        people.source,
        shipped_prior(),
        progress=partial(progress, "sentences"),
    )


def fit_score_calibration(
    blocks: Sequence[Block],
    embed_texts: EmbedTexts,
    fingerprint: str,
    source: str,
    prior: Prior | None,
    progress: Progress | None = None,
) -> ScoreCalibration:
    """Fit on all blocks; how reliable it is comes from fits that leave each block out in turn."""
    evidence = Evidence(embed_texts)
    background_SD = evidence.texts(BACKGROUND_SENTENCES)
    all_ND = np.concatenate([block.galleries[0].vectors_ND for block in blocks])
    middle, spread = scale_of(background_SD @ all_ND.T)
    background = Background(middle=middle, spread=spread)
    searches: list[list[_Search]] = []
    for number, block in enumerate(blocks):
        searches.append(search_block(block, evidence))
        if progress is not None:
            progress(number + 1, 2 * len(blocks))
    tables = [[_Table.of(one, background) for one in own] for own in searches]
    people = sum(map(_people, blocks))
    held_out = []
    for number, own in enumerate(tables):
        rest = [one for other, ones in enumerate(tables) if other != number for one in ones]
        picture, answer = _fit(rest, prior, people - _people(blocks[number]))
        held_out += [_judged(one, picture, answer) for one in own]
        if progress is not None:
            progress(len(blocks) + number + 1, 2 * len(blocks))
    picture, answer = _fit([one for own in tables for one in own], prior, people)
    # Few people do not show how far likelihoods of other people are off.
    nobody_below = _nobody_below(held_out) * people / (people + _CAUTION_PEOPLE)
    reached = reliability(held_out, nobody_below)
    if not reached["all"]["auroc"] >= _LEAST_AUROC:
        raise InputError(
            f"likelihoods of {source} are not reliable: on people left out AUROC is "
            f"{reached['all']['auroc']:.1f}, expected {_LEAST_AUROC:g} at least; write sentences "
            "that distinguish people, for more people",
            code="calibration_unreliable",
            auroc=reached["all"]["auroc"],
        )
    return ScoreCalibration(
        fingerprint=fingerprint,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        generator=f"upperson {upperson_rt.__version__}",
        version=1,
        fitted_on={
            "source": source,
            "people": people,
            "pictures": len(all_ND),
            "queries": sum(map(len, tables)),
            "sample": sample_features(evidence, background),
        },
        held_out=reached,
        background=background,
        picture=picture,
        answer=answer,
        curves={
            "sentence": _sentence_curve([one for own in tables for one in own]),
            "picture": _picture_curve([block.galleries[0] for block in blocks]),
        },
        nobody_below=nobody_below,
        reference=_reference(blocks),
    )


def search_block(block: Block, evidence: Evidence) -> list[_Search]:
    """Search each gallery of a block for its queries.

    Of each kind as many have a match as have none: a likelihood supposes even odds.
    """
    vectors_QD = evidence.texts([parse(one.sentence).wanted for one in block.queries])
    all_features = [
        SentenceFeatures(parse(query.sentence), vector_D, evidence)
        for query, vector_D in zip(block.queries, vectors_QD, strict=True)
    ]
    found = []
    for gallery in block.galleries:
        scores_QN = vectors_QD @ gallery.vectors_ND.T
        there: dict[tuple[Kind, bool], list[_Search]] = {}
        for query, features, scores_N in zip(block.queries, all_features, scores_QN, strict=True):
            best_N = np.argsort(-scores_N, kind="stable")[:CANDIDATES]
            right_N = query.right(gallery)
            search = _Search(
                kind=query.kind,
                features=features,
                pool_ND=gallery.vectors_ND[best_N],
                right_N=right_N[best_N[:COMPARED]],
                is_present=bool(right_N.any()),
                searched=len(right_N),
                person=query.person,
            )
            there.setdefault((search.kind, search.is_present), []).append(search)
        for kind in KINDS:
            present, absent = (there.get((kind, is_present), []) for is_present in (True, False))
            # One left out of a smaller gallery may look like others of the block, who are in it.
            # So people outside of the block come first.
            absent.sort(key=lambda one: one.person is not None)
            count = min(len(present), len(absent))
            found += present[:count] + absent[:count]
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Table:
    """Features of a query's candidates."""

    search: _Search
    features_NF: NDArray[np.float64]

    @classmethod
    def of(cls, search: _Search, background: Background) -> "_Table":
        compared_ND = search.pool_ND[:COMPARED]
        features_NF = search.features.of_pictures(
            compared_ND, search.pool_ND, background, search.searched
        )
        return cls(search=search, features_NF=features_NF)


@dataclass(frozen=True, kw_only=True, eq=False)
class Judgement:
    """What a calibration says of a query, and what is true."""

    kind: Kind
    is_present: bool
    person: int | None
    answer: float
    likely_N: NDArray[np.float64]
    """Of the first `COMPARED` candidates as they are shown: most likely first, at most `answer`."""
    right_N: NDArray[np.bool_]
    expected: float
    """How many of these match, on average."""


def judge_all(searches: Sequence[_Search], calibration: ScoreCalibration) -> list[Judgement]:
    """Judge queries by a calibration."""
    return [
        _judged(_Table.of(one, calibration.background), calibration.picture, calibration.answer)
        for one in searches
    ]


def _people(block: Block) -> int:
    return len(np.unique(block.galleries[0].people_N))


def _fit(tables: Sequence[_Table], prior: Prior | None, people: int) -> tuple[Logistic, Logistic]:
    picture = fit_logistic(
        np.concatenate([one.features_NF for one in tables]),
        np.concatenate([one.search.right_N for one in tables]),
        products=True,
        ridge=_PICTURE_RIDGE if prior is None else _PRIOR_PICTURE_RIDGE / people,
        prior=None if prior is None else prior.picture,
    )
    together_QF = np.stack([
        one.search.features.of_answer(one.features_NF, picture.log_odds(one.features_NF))
        for one in tables
    ])  # fmt: skip
    present_Q = np.array([one.search.is_present for one in tables])
    answer = fit_logistic(
        together_QF,
        present_Q,
        products=True,
        ridge=_ANSWER_RIDGE if prior is None else _PRIOR_ANSWER_RIDGE / people,
        prior=None if prior is None else prior.answer,
    )
    return picture, answer


def _judged(table: _Table, picture: Logistic, answer: Logistic) -> Judgement:
    log_odds_N = picture.log_odds(table.features_NF)
    likely_N = probability(log_odds_N)
    together_F = table.search.features.of_answer(table.features_NF, log_odds_N)
    of_answer = likelihood_of_any(
        float(probability(answer.log_odds(together_F[None]))[0]), likely_N
    )
    shown = np.argsort(-likely_N, kind="stable")
    return Judgement(
        kind=table.search.kind,
        is_present=table.search.is_present,
        person=table.search.person,
        answer=of_answer,
        likely_N=np.minimum(likely_N, of_answer)[shown],
        right_N=table.search.right_N[shown],
        expected=float(likely_N.sum()),
    )


def _nobody_below(judged: Sequence[Judgement]) -> float:
    """Return the limit that `_AIM` of the queries with a match are below.

    Of few queries, `_WRONG_NOBODY` less the one that a new query may be. The lower 80 % bound of a
    bootstrap over people: queries of one person are not independent.
    """
    by_group: dict[int, list[float]] = {}
    for number, one in enumerate(judged):
        if one.is_present:
            by_group.setdefault(-1 - number if one.person is None else one.person, []).append(
                one.answer
            )
    groups = [np.array(own) for own in by_group.values()]
    rng = np.random.default_rng(0)
    limits = []
    for _ in range(_DRAWS):
        drawn = rng.integers(len(groups), size=len(groups))
        present = np.sort(np.concatenate([groups[row] for row in drawn]))
        allowed = int(_WRONG_NOBODY * (len(present) + 1))
        most = present[allowed - 1] if allowed else 0.0
        limits.append(float(min(most, np.quantile(present, _AIM))))
    return min(float(np.quantile(limits, 1 - _NOBODY_CONFIDENCE)), _MOST_NOBODY)


def _sentence_curve(tables: Sequence[_Table]) -> Curve:
    return _curve(
        np.concatenate([one.features_NF[:, 0] for one in tables]),
        np.concatenate([one.search.right_N for one in tables]),
    )


def _picture_curve(parts: Sequence[LabelledPictures]) -> Curve:
    """Fit how likely a picture shows the person of another one, by their cosine."""
    deviations, right = [], []
    for part in parts:
        queries_QD, people_Q = part.vectors_ND[::4], part.people_N[::4]
        scores_QN = queries_QD @ part.vectors_ND.T
        same_QN = people_Q[:, None] == part.people_N[None]
        middle, spread = scale_of(scores_QN[~same_QN])
        scores_QN[np.arange(len(queries_QD)), np.arange(0, len(part.people_N), 4)] = -1  # Itself.
        best_QK = np.argsort(-scores_QN, axis=1)[:, :COMPARED]
        deviations.append((np.take_along_axis(scores_QN, best_QK, axis=1) - middle) / spread)
        right.append(np.take_along_axis(same_QN, best_QK, axis=1))
    return _curve(np.concatenate(deviations).ravel(), np.concatenate(right).ravel())


def _curve(deviations_N: NDArray[np.floating[Any]], right_N: NDArray[np.bool_]) -> Curve:
    fitted = fit_logistic(
        deviations_N[:, None].astype(np.float64), right_N, products=False, ridge=1.0
    )
    slope = fitted.weights[0] / fitted.scale[0]
    return Curve(slope=slope, middle=fitted.middle[0] - fitted.weights[1] / slope)


def _reference(blocks: Sequence[Block]) -> Reference:
    """Describe the pictures; no group of people of theirs is as far as the threshold."""
    vectors_ND = np.concatenate([block.galleries[0].vectors_ND for block in blocks]).astype(
        np.float64
    )
    keys: list[tuple[int, int]] = [
        (number, person)
        for number, block in enumerate(blocks)
        for person in block.galleries[0].people_N.tolist()
    ]
    known: dict[tuple[int, int], int] = {}
    people_N = np.array([known.setdefault(key, len(known)) for key in keys])
    mean_D = vectors_ND.mean(axis=0)
    variances, directions_DD = np.linalg.eigh(np.cov((vectors_ND - mean_D).T))
    # Variances need several pictures and people an axis.
    count = max(1, min(_AXES, vectors_ND.shape[1], len(vectors_ND) // 4, len(known) // 2))
    # The rest of the variance is added: small ones are underestimated.
    rest = max(float(variances[::-1][count:].sum()), 0.0) / count
    widths_R = np.sqrt(np.maximum(variances[::-1][:count], 0) + rest + 1e-12)
    axes_RD = (directions_DD[:, ::-1][:, :count] / widths_R).T
    cameras_N = np.concatenate([block.galleries[0].cameras_N for block in blocks])
    rng = np.random.default_rng(0)
    farthest = 0.0
    for _ in range(_DRAWS):
        is_own = np.isin(people_N, rng.permutation(len(known))[: len(known) // 2])
        camera = rng.choice(cameras_N)
        group = rng.permutation(np.flatnonzero(is_own & (cameras_N == camera)))[:LEAST]
        if len(group):
            apart_D = vectors_ND[group].mean(axis=0) - vectors_ND[~is_own].mean(axis=0)
            farthest = max(farthest, float(np.square(axes_RD @ apart_D).sum()))
    # Groups of few people scatter more than those that will be compared.
    noise = (1 / len(known) + 1 / _GROUP_PEOPLE) / (4 / len(known))
    return Reference(
        mean=tuple(mean_D.tolist()),
        axes=tuple(tuple(axis) for axis in axes_RD.tolist()),
        threshold=max(_MARGIN * farthest * min(1.0, noise), 1e-6),
    )


# --- How reliable it is


def reliability(judged: Sequence[Judgement], nobody_below: float) -> dict[str, Any]:
    """Return figures of answers by kind, and of single pictures; shares are percent."""
    kinds: Mapping[str, Sequence[Judgement]] = {
        "all": judged,
        **{kind: [one for one in judged if one.kind == kind] for kind in KINDS},
    }
    return {
        **{kind: _of_answers(own, nobody_below) for kind, own in kinds.items() if own},
        "pictures": _of_pictures(judged),
    }


def _of_answers(judged: Sequence[Judgement], nobody_below: float) -> dict[str, Any]:
    answer_Q = np.array([one.answer for one in judged])
    present_Q = np.array([one.is_present for one in judged])
    is_nobody = answer_Q < nobody_below
    return {
        "queries": len(judged),
        "present": int(present_Q.sum()),
        "auroc": round(auroc(answer_Q[present_Q], answer_Q[~present_Q]) or 0.0, 2),
        "error": round(calibration_error(answer_Q, present_Q), 2),
        "wrong_nobody": round(100 * _mean(is_nobody[present_Q]), 2),
        "caught_nobody": round(100 * _mean(is_nobody[~present_Q]), 2),
        "tenths": tenths(answer_Q, present_Q),
    }


def _of_pictures(judged: Sequence[Judgement]) -> dict[str, Any]:
    likely = np.concatenate([one.likely_N for one in judged])
    right = np.concatenate([one.right_N for one in judged])
    first = np.array([one.likely_N[0] for one in judged])
    first_right = np.array([one.right_N[0] for one in judged])
    return {
        "error": round(calibration_error(likely, right), 2),
        "first_error": round(calibration_error(first, first_right), 2),
        "expected": round(sum(one.expected for one in judged)),
        "right": int(right.sum()),
        "tenths": tenths(likely, right),
    }


def tenths(likely_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> list[list[float]]:
    """Return by tenth of likelihood: how many, the sum of likelihoods, and how many are right."""
    tenth_N = np.minimum((10 * likely_N).astype(int), 9)
    columns = [np.bincount(tenth_N, one, 10) for one in (np.ones(len(likely_N)), likely_N, right_N)]
    return [[round(value, 2) for value in row] for row in np.stack(columns, axis=1).tolist()]


def calibration_error(likely_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> float:
    """Return the expected calibration error over ten bins, in points."""
    table = np.array(tenths(likely_N, right_N))
    return float(100 * np.abs(table[:, 1] - table[:, 2]).sum() / max(1.0, table[:, 0].sum()))


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0
