"""Run a subject over all batches and compare every embedding with what is expected of it.

Shapes: N items, E embedding width, T texts, G images.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from upperson_export.parity.inputs import Case, ParityInputs, iter_cases, length_buckets
from upperson_export.parity.ranking import RankingAgreement, compare_rankings
from upperson_export.parity.subjects import RunTower, Subject
from upperson_rt.agreement import Agreement, compare_embeds, exchanged_item, is_constant
from upperson_rt.errors import IntegrityError
from upperson_rt.towers import TOWERS, Tower

Embeds = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Embeddings of some items in one way of batching, compared."""

    variant: str
    backend: str
    tower: Tower | Literal["both"]
    batch_size: int
    inputs: str
    """``all`` images, texts of ``9-16`` tokens, ``mixed`` or ``padded``; ``files`` and
    ``sentences`` went the whole way from disk or string."""
    items: tuple[int, ...] = ()
    """Indices of the items; `Agreement` counts in these. Empty for both towers together."""
    to_reference: Agreement | None = None
    """None for both towers together, and after a refusal."""
    to_alone: Agreement | None = None
    """Against the same items alone in the same form; None where they are alone."""
    ranking: RankingAgreement | None = None
    """Text to image. For one tower, the other one is the reference's. None after a refusal."""
    not_finite: int | None = None
    """Index of an item whose embedding is not finite, if there is one."""
    constant: bool = False
    """All items have one embedding, and should not."""
    exchanged: tuple[int, int] | None = None
    """An item and the other one whose embedding it has."""
    refusal: str | None = None
    """Why the runtime's encoder gave no embeddings at all."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What is expected: each item alone, in the form that is compared with."""

    name: str
    alone: dict[Tower, Embeds]
    whole_way: dict[Tower, Embeds]
    """From files and sentences."""


def make_reference(subject: Subject, inputs: ParityInputs) -> Reference:
    """Embed every item alone.

    Raises:
        IntegrityError: An embedding is not finite, or all are the same: nothing can be compared
            with that.
    """
    alone = {tower: embed_alone(subject.run, inputs, tower) for tower in TOWERS}
    whole_way = {tower: _whole_way(subject, inputs, tower, 1) for tower in TOWERS}
    for tower in TOWERS:
        for embeds in (alone[tower], whole_way[tower]):
            bad = _first_not_finite(embeds)
            if bad is not None:
                raise IntegrityError(
                    f"the reference ({subject.name}) gives no finite embedding for "
                    f"{inputs.item_name(tower, bad)}: check the weights"
                )
        if is_constant(alone[tower]) and inputs.differ(tower):
            raise IntegrityError(
                f"the reference ({subject.name}) gives every {tower} the same embedding: check the "
                "weights, or compare with the run by  --run RUN"
            )
    return Reference(name=subject.name, alone=alone, whole_way=whole_way)


def embed_alone(run: RunTower, inputs: ParityInputs, tower: Tower) -> Embeds:
    """Embed every item in a batch of its own, without padding: [N, E]."""
    items = range(inputs.count(tower))
    return np.concatenate([run(tower, inputs.batch(tower, np.array([item]))) for item in items])


def iter_comparisons(
    subject: Subject, reference: Reference, inputs: ParityInputs, batch_sizes: Sequence[int]
) -> Iterator[Comparison]:
    """Yield the comparisons of a subject: image tower, text tower, both.

    Raises:
        IntegrityError: The embeddings are not as many or not as long as those of the reference.
        BackendError: The backend fails.
    """
    found: dict[Tower, dict[int, Embeds]] = {"image": {}, "text": {}}
    for tower in TOWERS:
        alone_NE = embed_alone(subject.run, inputs, tower)
        _require_shape(subject, tower, alone_NE, reference.alone[tower].shape)
        for case in iter_cases(inputs, tower, batch_sizes):
            items_M = np.concatenate(case.batches)
            is_alone = case.batch_size == 1 and case.layout == "like"
            found_ME = alone_NE[items_M] if is_alone else _run_case(subject, inputs, case)
            _require_shape(subject, tower, found_ME, (len(items_M), alone_NE.shape[1]))
            if case.layout == "like":
                by_item_NE = found[tower][case.batch_size] = np.empty_like(alone_NE)
                by_item_NE[items_M] = found_ME
            for name, group_M in _groups(inputs, case, items_M).items():
                yield _compare(
                    subject,
                    reference,
                    case,
                    name,
                    items_M[group_M],
                    found_ME[group_M],
                    None if is_alone else alone_NE,
                )
        yield _compare_whole_way(subject, reference, inputs, tower, max(batch_sizes))
    for size in batch_sizes:
        yield Comparison(
            variant=subject.variant,
            backend=subject.backend,
            tower="both",
            batch_size=size,
            inputs="all",
            ranking=compare_rankings(
                reference.alone["text"] @ reference.alone["image"].T,
                found["text"][size] @ found["image"][size].T,
            ),
        )


def count_comparisons(inputs: ParityInputs, batch_sizes: Sequence[int]) -> int:
    """Return how many comparisons `iter_comparisons` yields, for progress."""
    per_case = {"image": 1, "text": len(length_buckets(inputs.lengths))}
    return len(batch_sizes) + sum(
        1
        + sum(
            per_case[tower] if case.layout == "like" else 1
            for case in iter_cases(inputs, tower, batch_sizes)
        )
        for tower in TOWERS
    )


def _groups(
    inputs: ParityInputs, case: Case, items_M: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Split the items of a case into the groups that are reported: texts by their length."""
    if case.tower == "text" and case.layout == "like":
        buckets = length_buckets(inputs.lengths)
        return {name: mask_N[items_M] for name, mask_N in buckets.items()}
    return {"all" if case.layout == "like" else case.layout: np.ones(len(items_M), dtype=bool)}


def _compare(
    subject: Subject,
    reference: Reference,
    case: Case,
    name: str,
    items_M: npt.NDArray[np.int64],
    found_ME: Embeds,
    alone_NE: Embeds | None,
) -> Comparison:
    """Compare the embeddings of M items; ``alone_NE`` is None where they are those themselves."""
    expected_ME = reference.alone[case.tower][items_M]
    image_GE, text_TE = reference.alone["image"], reference.alone["text"]
    if case.tower == "text":
        ranking = compare_rankings(expected_ME @ image_GE.T, found_ME @ image_GE.T)
    else:
        ranking = compare_rankings(text_TE @ expected_ME.T, text_TE @ found_ME.T)
    exchanged = to_alone = None
    if alone_NE is not None:
        exchanged = exchanged_item(alone_NE, found_ME, items_M)
        to_alone = compare_embeds(alone_NE[items_M], found_ME)
    return Comparison(
        variant=subject.variant,
        backend=subject.backend,
        tower=case.tower,
        batch_size=case.batch_size,
        inputs=name,
        items=tuple(items_M.tolist()),
        to_reference=compare_embeds(expected_ME, found_ME),
        to_alone=to_alone,
        ranking=ranking,
        not_finite=_item(items_M, _first_not_finite(found_ME)),
        constant=is_constant(found_ME) and not is_constant(expected_ME),
        exchanged=exchanged,
    )


def _compare_whole_way(
    subject: Subject, reference: Reference, inputs: ParityInputs, tower: Tower, batch_size: int
) -> Comparison:
    """Compare what files or sentences become; the encoder refuses what is no direction at all."""
    compared = Comparison(
        variant=subject.variant,
        backend=subject.backend,
        tower=tower,
        batch_size=batch_size,
        inputs="files" if tower == "image" else "sentences",
        items=tuple(range(inputs.count(tower))),
    )
    try:
        found_NE = _whole_way(subject, inputs, tower, batch_size)
    except IntegrityError as error:
        return replace(compared, refusal=str(error))
    expected_NE = reference.whole_way[tower]
    _require_shape(subject, tower, found_NE, expected_NE.shape)
    other = reference.whole_way["image" if tower == "text" else "text"]
    expected_QG, found_QG = expected_NE @ other.T, found_NE @ other.T
    if tower == "image":
        expected_QG, found_QG = expected_QG.T, found_QG.T
    return replace(
        compared,
        to_reference=compare_embeds(expected_NE, found_NE),
        ranking=compare_rankings(expected_QG, found_QG),
        not_finite=_first_not_finite(found_NE),
        constant=is_constant(found_NE) and not is_constant(expected_NE),
    )


def _whole_way(subject: Subject, inputs: ParityInputs, tower: Tower, batch_size: int) -> Embeds:
    """Embed files or sentences: [N, E]."""
    if subject.encode is not None:
        return subject.encode(tower, inputs, batch_size)
    prepared = inputs.pixels_NHW3 if tower == "image" else inputs.sentence_ids_NL
    return np.concatenate(
        [
            subject.run(tower, prepared[start : start + batch_size])
            for start in range(0, len(prepared), batch_size)
        ]
    )


def _run_case(subject: Subject, inputs: ParityInputs, case: Case) -> Embeds:
    return np.concatenate(
        [subject.run(case.tower, inputs.batch(case.tower, b, case.width)) for b in case.batches]
    )


def _first_not_finite(found_NE: Embeds) -> int | None:
    bad = np.flatnonzero(~np.isfinite(found_NE).all(axis=1))
    return int(bad[0]) if bad.size else None


def _item(items_M: npt.NDArray[np.int64], place: int | None) -> int | None:
    return None if place is None else int(items_M[place])


def _require_shape(
    subject: Subject, tower: Tower, found: Embeds, expected: tuple[int, ...]
) -> None:
    if found.shape != expected:
        raise IntegrityError(
            f"{subject.name}: the {tower} tower gives embeddings of shape {found.shape}, expected "
            f"{expected}: export again"
        )
