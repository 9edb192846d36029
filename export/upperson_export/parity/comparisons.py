"""Run a subject over all batches, and compare every embedding with the reference.

Shapes: N items, M of them, E embedding width, T texts, G images, Q queries.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from upperson_export.parity.inputs import Case, ParityInputs, iter_cases, length_buckets
from upperson_export.parity.subjects import RunTower, Subject
from upperson_rt.agreement import Agreement, compare_embeds, is_constant
from upperson_rt.errors import IntegrityError
from upperson_rt.towers import TOWERS, Tower, batch_slices
from upperson_scores.rankings import TOP_K, exchanged_item, top_k_overlap

Embeds = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingAgreement:
    """Agreement of the rankings of Q queries; 1 is the same, for tau 0 is chance."""

    top_k: int
    """TOP_K, or the whole gallery if it is smaller."""
    mean_overlap: float
    """Share of the first `top_k` that both rankings name."""
    min_overlap: float
    mean_tau: float
    """Kendall's tau-b over the whole gallery."""
    min_tau: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityComparison:
    """Embeddings of some items in one way of batching, compared."""

    variant: str
    backend: str
    tower: Tower | Literal["both"]
    batch_size: int
    inputs: str
    """``all`` images, texts of ``9-16`` tokens, ``mixed`` or ``padded``; ``files`` and
    ``sentences`` were embedded end to end, from disk or string."""
    items: tuple[int, ...] = ()
    """Indices of the items; `Agreement` counts in these. Empty for both towers together."""
    to_reference: Agreement | None = None
    """None for both towers together, and after a refusal."""
    to_alone: Agreement | None = None
    """To the same items alone in the same subject; None where they are alone."""
    ranking: RankingAgreement | None = None
    """Text to image. For one tower, the other one is the reference's. None after a refusal."""
    constant: bool = False
    """Whether all items have one embedding, unlike in the reference."""
    exchanged: tuple[int, int] | None = None
    """An item and the other one whose embedding it has."""
    refusal: str | None = None
    """Why the runtime's encoder gave no embeddings at all."""

    @property
    def not_finite(self) -> int | None:
        """Index of an item whose embedding is not finite, if there is one."""
        if self.to_reference is None or not self.to_reference.not_finite:
            return None
        return self.items[int(self.to_reference.finite_N.argmin())]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Expected embeddings: each item alone, by the reference subject."""

    name: str
    alone: dict[Tower, Embeds]
    end_to_end: dict[Tower, Embeds]
    """From files and sentences."""


def make_reference(subject: Subject, inputs: ParityInputs) -> Reference:
    """Embed every item alone."""
    alone = {tower: _embed(subject.run, inputs, _alone(inputs, tower)) for tower in TOWERS}
    end_to_end = {tower: _end_to_end(subject, inputs, tower, 1) for tower in TOWERS}
    for tower in TOWERS:
        for embeds_NE in (alone[tower], end_to_end[tower]):
            finite_N = np.isfinite(embeds_NE).all(axis=1)
            if not finite_N.all():
                raise IntegrityError(
                    f"the reference ({subject.name}) gives no finite embedding for "
                    f"{inputs.item_name(tower, int(finite_N.argmin()))}: check the weights",
                    code="reference_not_finite",
                )
        if is_constant(alone[tower]) and inputs.differ(tower):
            raise IntegrityError(
                f"the reference ({subject.name}) gives every {tower} the same embedding: check the "
                "weights, or compare with the run by  --run RUN",
                code="reference_constant",
            )
    return Reference(name=subject.name, alone=alone, end_to_end=end_to_end)


def iter_comparisons(
    subject: Subject, reference: Reference, inputs: ParityInputs, batch_sizes: Sequence[int]
) -> Iterator[ParityComparison]:
    """Yield the comparisons of a subject: image tower, text tower, both."""
    found: dict[Tower, dict[int, Embeds]] = {tower: {} for tower in TOWERS}
    for tower in TOWERS:
        alone_NE = _embed(subject.run, inputs, _alone(inputs, tower))
        _require_shape(subject, tower, alone_NE, reference.alone[tower].shape)
        for case in iter_cases(inputs, tower, batch_sizes):
            items_M = np.concatenate(case.batches)
            is_alone = case.batch_size == 1 and case.layout == "like"
            found_ME = alone_NE[items_M] if is_alone else _embed(subject.run, inputs, case)
            _require_shape(subject, tower, found_ME, (len(items_M), alone_NE.shape[1]))
            if case.layout == "like":
                by_item_NE = found[tower][case.batch_size] = np.empty_like(alone_NE)
                by_item_NE[items_M] = found_ME
            for name, group_M in _groups(inputs, case, items_M).items():
                items, embeds = items_M[group_M], found_ME[group_M]
                compared = _compare_to_reference(
                    _blank(subject, tower, case.batch_size, name, items),
                    reference.alone[tower][items],
                    embeds,
                    reference.alone,
                )
                if not is_alone:
                    compared = replace(
                        compared,
                        to_alone=compare_embeds(alone_NE[items], embeds),
                        exchanged=exchanged_item(alone_NE, embeds, items),
                    )
                yield compared
        yield _compare_end_to_end(subject, reference, inputs, tower, max(batch_sizes))
    for size in batch_sizes:
        ranking = compare_rankings(
            _scores(reference.alone["text"], reference.alone["image"]),
            _scores(found["text"][size], found["image"][size]),
        )
        yield replace(_blank(subject, "both", size, "all"), ranking=ranking)


def count_comparisons(inputs: ParityInputs, batch_sizes: Sequence[int]) -> int:
    """Return how many comparisons `iter_comparisons` yields, for progress."""
    cases = [case for tower in TOWERS for case in iter_cases(inputs, tower, batch_sizes)]
    groups = sum(len(_groups(inputs, case, np.concatenate(case.batches))) for case in cases)
    return groups + len(TOWERS) + len(batch_sizes)


def _groups(
    inputs: ParityInputs, case: Case, items_M: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Split the items of a case into the groups that are reported: texts by their length."""
    if case.tower == "text" and case.layout == "like":
        buckets = length_buckets(inputs.lengths)
        return {name: mask_N[items_M] for name, mask_N in buckets.items()}
    return {"all" if case.layout == "like" else case.layout: np.ones(len(items_M), dtype=bool)}


def _blank(
    subject: Subject,
    tower: Tower | Literal["both"],
    batch_size: int,
    inputs: str,
    items: Sequence[int] | npt.NDArray[np.int64] = (),
) -> ParityComparison:
    """Return what is compared, with nothing compared yet."""
    return ParityComparison(
        variant=subject.variant,
        backend=subject.backend,
        tower=tower,
        batch_size=batch_size,
        inputs=inputs,
        items=tuple(int(item) for item in items),
    )


def _compare_to_reference(
    blank: ParityComparison, expected_ME: Embeds, found_ME: Embeds, reference: dict[Tower, Embeds]
) -> ParityComparison:
    """Compare embeddings of one tower, and the rankings they give beside the reference's other."""
    expected_TG, found_TG = (
        _scores(rows_ME, reference["image"])
        if blank.tower == "text"
        else _scores(reference["text"], rows_ME)
        for rows_ME in (expected_ME, found_ME)
    )
    return replace(
        blank,
        to_reference=compare_embeds(expected_ME, found_ME),
        ranking=compare_rankings(expected_TG, found_TG),
        constant=is_constant(found_ME) and not is_constant(expected_ME),
    )


def _compare_end_to_end(
    subject: Subject, reference: Reference, inputs: ParityInputs, tower: Tower, batch_size: int
) -> ParityComparison:
    """Compare files or sentences end to end; the encoder refuses an embedding of length 0."""
    name = "files" if tower == "image" else "sentences"
    blank = _blank(subject, tower, batch_size, name, range(inputs.count(tower)))
    try:
        found_NE = _end_to_end(subject, inputs, tower, batch_size)
    except IntegrityError as error:
        return replace(blank, refusal=str(error))
    expected_NE = reference.end_to_end[tower]
    _require_shape(subject, tower, found_NE, expected_NE.shape)
    return _compare_to_reference(blank, expected_NE, found_NE, reference.end_to_end)


# --- embedding ---


def _alone(inputs: ParityInputs, tower: Tower) -> Case:
    """Return every item in a batch of its own, without padding."""
    batches = list(np.arange(inputs.count(tower))[:, None])
    return Case(tower=tower, batch_size=1, layout="like", batches=batches)


def _embed(run: RunTower, inputs: ParityInputs, case: Case) -> Embeds:
    return np.concatenate(
        [run(case.tower, inputs.batch(case.tower, b, case.width)) for b in case.batches]
    )


def _end_to_end(subject: Subject, inputs: ParityInputs, tower: Tower, batch_size: int) -> Embeds:
    """Embed files or sentences: [N, E]."""
    if subject.end_to_end is not None:
        if tower == "image":
            return subject.end_to_end.encode_images(list(inputs.files), batch_size)
        return subject.end_to_end.encode_texts(inputs.sentences, batch_size)
    prepared = inputs.pixels_NHW3 if tower == "image" else inputs.sentence_ids_NL
    batches = [prepared[rows] for rows in batch_slices(len(prepared), batch_size)]
    return np.concatenate([subject.run(tower, batch) for batch in batches])


def _require_shape(
    subject: Subject, tower: Tower, found: Embeds, expected: tuple[int, ...]
) -> None:
    if found.shape != expected:
        raise IntegrityError(
            f"{subject.name}: the {tower} tower gives embeddings of shape {found.shape}, expected "
            f"{expected}: export again",
            code="shape_differs",
            found=found.shape,
            expected=expected,
        )


# --- rankings ---


def _scores(text_TE: Embeds, image_GE: Embeds) -> npt.NDArray[np.float32]:
    """Score every image for every text: [T, G]."""
    with np.errstate(invalid="ignore"):  # Values that are not finite are reported as such.
        scores_TG: npt.NDArray[np.float32] = text_TE @ image_GE.T
    return scores_TG


def compare_rankings(
    expected_QG: npt.NDArray[Any], found_QG: npt.NDArray[Any], top_k: int = TOP_K
) -> RankingAgreement:
    """Compare how two similarity matrices order the gallery; one that is not finite counts as 0."""
    found_QG = np.nan_to_num(found_QG, nan=0.0, posinf=0.0, neginf=0.0)
    top_k = min(top_k, expected_QG.shape[1])
    overlap_Q = top_k_overlap(expected_QG, found_QG, top_k)
    tau_Q = np.array([kendall_tau_b(a, b) for a, b in zip(expected_QG, found_QG, strict=True)])
    return RankingAgreement(
        top_k=top_k,
        mean_overlap=float(overlap_Q.mean()),
        min_overlap=float(overlap_Q.min()),
        mean_tau=float(tau_Q.mean()),
        min_tau=float(tau_Q.min()),
    )


def kendall_tau_b(a_G: npt.NDArray[Any], b_G: npt.NDArray[Any]) -> float:
    """Return Kendall's tau-b of two score vectors.

        tau_b = (concordant - discordant) / sqrt(pairs not tied in a * pairs not tied in b)

    0 if all values of either are equal. Takes O(G^2) time and memory: for galleries of up to a few
    thousand.
    """
    upper = np.triu_indices(len(a_G), k=1)
    sign_a = np.sign(a_G[:, None] - a_G[None, :])[upper]
    sign_b = np.sign(b_G[:, None] - b_G[None, :])[upper]
    untied = float(np.count_nonzero(sign_a)) * float(np.count_nonzero(sign_b))
    return float((sign_a * sign_b).sum() / np.sqrt(untied)) if untied else 0.0
