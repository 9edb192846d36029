"""Broken backends, and the verdict on them."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.toy_parity import COUNT, check, honest, rotated_rows, subject
from upperson_export.parity.subjects import FP32_TOLERANCE, Tolerance


def constant(tower, batch):
    return np.full((len(batch), 16), 0.25, np.float32)


def wrong_in_batches(tower, batch):
    embeds = honest(tower, batch)
    return embeds if len(batch) == 1 else embeds + 0.1 * np.roll(embeds, 3, axis=1)


def stale_rest(tower, batch):
    """An odd last batch is answered from the first row of a full one."""
    embeds = honest(tower, batch)
    if len(batch) in (3, COUNT % 8):
        embeds[-1] = embeds[0]
    return embeds


def broken_once(tower, batch):
    embeds = honest(tower, batch)
    if len(batch) == 8:
        embeds[5] = np.nan
    return embeds


def sees_padding(tower, batch):
    embeds = honest(tower, batch)
    if tower == "text":
        embeds[:, 0] += 0.05 * (batch == 0).mean(axis=1)
    return embeds


LOOSE = Tolerance(min_cosine=0.9)


def test_an_honest_backend_with_other_rounding_passes(inputs):
    def rounded(tower, batch):
        return honest(tower, batch) + np.float32(2e-6 * (-1) ** len(batch))

    result = check(subject(rounded), inputs)
    assert result.ok
    assert result.message() == ""
    assert (result.worst, result.would_pass()) == (None, None)
    assert {one.comparison.inputs for one in result.judged} == {
        "all", "files", "3-8", "9-12", "mixed", "padded", "sentences"
    }  # fmt: skip


SAME, EXCHANGED, NOT_FINITE = "same embedding", "has the embedding of", "no finite embedding"


@pytest.mark.parametrize(
    ("broken", "tolerance", "fault"),
    [
        (constant, FP32_TOLERANCE, SAME),
        (constant, LOOSE, SAME),
        (rotated_rows, FP32_TOLERANCE, EXCHANGED),
        (rotated_rows, LOOSE, EXCHANGED),
        (stale_rest, LOOSE, EXCHANGED),
        (broken_once, LOOSE, NOT_FINITE),
    ],
)
def test_a_fault_that_no_tolerance_lets_pass(inputs, broken, tolerance, fault):
    result = check(subject(broken, tolerance), inputs)
    assert not result.ok
    assert result.would_pass() is None
    assert fault in result.message()
    assert "no tolerance" in result.message()


def test_rows_that_are_exchanged_are_found_even_if_all_people_look_alike(inputs):
    """Where every two embeddings have cosine 0.99, the floor alone would let this pass."""

    def alike(tower, batch):
        raw = 10 * np.ones(16) / 4 + honest(tower, batch)
        return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)

    def exchanged(tower, batch):
        return alike(tower, batch)[::-1]

    tolerance = Tolerance(min_cosine=0.9)
    expected = subject(alike)
    result = check(subject(exchanged, tolerance), inputs, expected)
    closest = [one.comparison.to_reference for one in result.judged]
    assert all(one is None or one.min_cosine > tolerance.min_cosine for one in closest)
    assert "has the embedding of" in result.message()
    assert check(subject(alike, tolerance), inputs, expected).ok


@pytest.mark.parametrize("floor", [None, 0.9999])
def test_wrong_only_in_batches_is_named_with_a_tolerance_that_passes(inputs, floor):
    tolerance = FP32_TOLERANCE if floor is None else Tolerance(min_cosine=floor)
    result = check(subject(wrong_in_batches, tolerance), inputs)
    failing = {one.comparison.batch_size for one in result.judged if one.fault}
    assert failing == {2, 8}
    message = result.message()
    assert "fp32 on fake 1.0, " in message
    assert " tower, batch " in message
    loosened = result.would_pass()
    assert loosened is not None
    (option,) = loosened
    assert option == ("max_error" if floor is None else "min_cosine")
    assert f"--{option.replace('_', '-')} {loosened[option]:g} would pass" in message
    assert check(subject(wrong_in_batches, Tolerance(**loosened)), inputs).ok
    tight = {"max_error": loosened[option] / 1.2, "min_cosine": 1 - (1 - loosened[option]) / 1.2}
    assert not check(subject(wrong_in_batches, Tolerance(**{option: tight[option]})), inputs).ok


def test_padding_that_matters_is_named(inputs):
    result = check(subject(sees_padding), inputs)
    failing = {(one.comparison.tower, one.comparison.inputs) for one in result.judged if one.fault}
    assert failing >= {("text", "padded"), ("text", "mixed")}
    assert {tower for tower, _ in failing} == {"text"}
    assert not [one for one in result.judged if one.fault and one.comparison.batch_size == 1
                and one.comparison.inputs != "padded"]  # fmt: skip
    assert 'caption 0 "a man in a red coat" made 3 tokens long' in result.message()
    assert "padded to the context" in result.message()


def test_a_suggested_tolerance_holds_for_all_variants(inputs):
    """A stricter floor of one variant must not become that of a worse one that had passed."""

    def noisy(size):
        def embed(tower, batch):
            embeds = honest(tower, batch)
            return (embeds + size * np.sign(embeds)).astype(np.float32)

        return embed

    strict, loose = Tolerance(min_cosine=0.9999), Tolerance(min_cosine=0.5)
    one = check(subject(noisy(0.02), strict), inputs)
    other = check(subject(noisy(0.05), loose), inputs)
    assert not one.ok
    assert other.ok
    together = replace(one, judged=[*one.judged, *other.judged])
    loosened = together.would_pass()
    assert loosened is not None
    for size in (0.02, 0.05):
        assert check(subject(noisy(size), Tolerance(**loosened)), inputs).ok


def test_the_result_as_json_names_the_worst_comparison(inputs):
    found = check(subject(broken_once), inputs).as_dict()
    assert (found["ok"], found["worst"]["batch_size"]) == (False, 8)
    assert NOT_FINITE in found["worst"]["failure"]
    assert found["worst"]["to_reference"]["max_error"] is None
    assert found["images"] == found["captions"] == COUNT
    assert found["preprocessing"]["equal"] is True


def test_no_tolerance_lets_one_pass_that_is_not_finite_alone(inputs):
    """Nor where items alone are not among the batch sizes: batches are held to them, too."""

    def broken_alone(tower, batch):
        embeds = honest(tower, batch)
        return embeds if len(batch) > 1 else embeds * np.float32("nan")

    result = check(subject(broken_alone), inputs)
    in_batches = replace(
        result, judged=[one for one in result.judged if one.comparison.batch_size == 8]
    )
    assert not in_batches.ok
    assert "by inf" in in_batches.message()
    assert in_batches.would_pass() is None


def test_an_item_that_is_not_finite_is_named(inputs):
    def one_broken(tower, batch):
        embeds = honest(tower, batch)
        if tower == "image":
            embeds[(batch == inputs.pixels_NHW3[7]).all(axis=(1, 2, 3))] = np.inf
        return embeds

    result = check(subject(one_broken), inputs)
    broken = [one for one in result.judged if one.fault and one.fault.severity == 3]
    assert {one.comparison.not_finite for one in broken} == {7}
    assert f"image {inputs.image_names[7]} has {NOT_FINITE}" in result.message()


@pytest.mark.parametrize(
    ("floor", "cosine", "expected"),
    [
        (0.85, 0.9, "at least 0.85 "),
        (0.5, 0.9, ""),
        (0.9995, 0.9997, "at least 0.999 "),  # Batches have a floor of their own.
        (0.9995, 0.9998, ""),
    ],
)
def test_a_batch_is_held_to_the_item_alone(inputs, floor, cosine, expected):
    """Alone and in batches as far from what is expected, and on opposite sides of it."""

    def to_one_side(tower, batch):
        embeds = honest(tower, batch)
        aside = np.roll(embeds, 5, axis=1)
        aside -= (aside * embeds).sum(axis=1, keepdims=True) * embeds
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        sine = np.sqrt(1 - cosine**2) * (1 if len(batch) == 1 else -1)
        return (cosine * embeds + sine * aside).astype(np.float32)

    result = check(subject(to_one_side, Tolerance(min_cosine=floor)), inputs)
    assert result.ok == (not expected)
    assert expected in result.message() + " "
