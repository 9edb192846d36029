"""Parity checks: what they feed and compare, broken backends, and the verdict on them."""

from dataclasses import asdict, replace
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from tests.helpers.refused import refused
from tests.helpers.toy_bundle import (
    COLOURS,
    CONTEXT_LENGTH,
    HEIGHT_PX,
    WIDTH_PX,
    draw_person,
    make_toy_bundle,
    make_toy_tokenizer_json,
    replace_in_bundle,
)
from upperson_export.parity.check import ParityResult, judge
from upperson_export.parity.comparisons import (
    compare_rankings,
    count_comparisons,
    iter_comparisons,
    kendall_tau_b,
    make_reference,
)
from upperson_export.parity.inputs import compare_pixels, iter_cases, read_inputs
from upperson_export.parity.subjects import (
    FP32_TOLERANCE,
    BackendChoice,
    NotRun,
    Subject,
    Tolerance,
    bundle_reference,
    choose_backends,
    iter_bundle_subjects,
    tolerance_of,
)
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.tokenizer import Tokenizer

COUNT = 11
BATCH_SIZES = [1, 2, 8]
CAPTIONS = [f"a {'wo' * (n % 2)}man in a {colour} coat" for n, colour in enumerate(COLOURS)] * 2


def toy_tokenizer():
    return Tokenizer.from_json(make_toy_tokenizer_json(), CONTEXT_LENGTH)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, colours = tmp_path_factory.mktemp("people"), list(COLOURS) * 2
    files = [draw_person(folder / f"{n}.png", colours[n], seed=n) for n in range(COUNT)]
    return read_inputs(
        files, CAPTIONS[:COUNT], toy_tokenizer(), height_px=HEIGHT_PX, width_px=WIDTH_PX
    )


def honest(tower, batch):
    """Embed well: whatever the batch, and whatever the padding."""
    flat = batch.reshape(len(batch), -1).astype(np.float64)
    width = flat.shape[1]
    weights = np.random.default_rng(0).normal(size=(HEIGHT_PX * WIDTH_PX * 3, 16))[:width]
    raw = (flat / 255 - 0.5) @ weights if tower == "image" else flat @ weights
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def rotated_rows(tower, batch):
    return np.roll(honest(tower, batch), 1, axis=0)


def subject(embed, tolerance=FP32_TOLERANCE, **fields):
    return Subject(variant="fp32", backend="fake 1.0", tolerance=tolerance, run=embed, **fields)


def check(one, inputs, reference=None):
    """Compare a subject with one, by default an honest one, in batches of `BATCH_SIZES`."""
    expected = make_reference(reference or subject(honest), inputs)
    found = list(iter_comparisons(one, expected, inputs, BATCH_SIZES))
    assert len(found) == count_comparisons(inputs, BATCH_SIZES)
    return ParityResult(
        reference=expected.name,
        inputs=inputs,
        batch_sizes=BATCH_SIZES,
        pixel_paths=compare_pixels(inputs.pixels_NHW3, inputs),
        judged=[judge(comparison, one.tolerance, inputs) for comparison in found],
        not_run=[],
    )


def test_every_item_is_in_a_batch_of_every_layout(inputs):
    for tower, size in (("image", 3), ("text", 1), ("text", 3), ("text", 32)):
        cases = list(iter_cases(inputs, tower, [size]))
        layouts = [case.layout for case in cases]
        expected = ["like"] if tower == "image" else ["like", "mixed", "padded"]
        assert layouts == [name for name in expected if size > 1 or name != "mixed"]
        for case in cases:
            assert set(np.concatenate(case.batches).tolist()) == set(range(COUNT))
            rest = COUNT % size if size < COUNT else size
            assert len(case.batches[-1]) == (rest or size)
    like, mixed, padded = iter_cases(inputs, "text", [4])
    longest = [max(inputs.lengths[batch]) for batch in like.batches]
    assert longest == sorted(longest)
    spread = [np.ptp(inputs.lengths[batch]) for batch in mixed.batches]
    assert max(spread) > max(np.ptp(inputs.lengths[batch]) for batch in like.batches)
    for batch in padded.batches:
        ids = inputs.batch("text", batch, padded.width)
        assert ids.shape == (len(batch), CONTEXT_LENGTH)
        for row, item in zip(ids, batch, strict=True):
            assert row[: inputs.lengths[item]].tolist() == inputs.ids[item].tolist()
            assert not row[inputs.lengths[item] :].any()


def test_pixels_are_compared_in_levels_and_nothing_is_refused(inputs):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), dtype=np.uint8)
    given = replace(inputs, pixels_NHW3=pixels, image_names="abc")
    float32 = (pixels.astype(np.float32) / 255 - 0.48) / 0.27
    assert compare_pixels((float32 * 0.27 + 0.48) * 255, given).are_equal
    with refused("nothing_to_compare", InputError, images=0, captions=1):
        read_inputs([], ["a man"], toy_tokenizer(), height_px=24, width_px=8)
    other = pixels.copy()
    other[1, 2, 0, 1] ^= 1
    found = compare_pixels(other, given)
    assert (found.max_difference, found.worst, found.are_equal) == (1.0, "b", False)
    assert "image b" in found.message()


def literal_tau_b(a, b):
    """Kendall's tau-b from its definition, pair by pair."""
    concordant = discordant = tied_a = tied_b = 0
    pairs = list(combinations(range(len(a)), 2))
    for i, j in pairs:
        product = (a[i] - a[j]) * (b[i] - b[j])
        concordant += product > 0
        discordant += product < 0
        tied_a += a[i] == a[j]
        tied_b += b[i] == b[j]
    return (concordant - discordant) / np.sqrt((len(pairs) - tied_a) * (len(pairs) - tied_b))


def test_tau_b_equals_its_definition_with_and_without_ties():
    for levels in (3, 1000):
        rng = np.random.default_rng(levels)
        for length in (5, 30):
            a, b = rng.integers(0, levels, (2, length)).astype(np.float32)
            assert kendall_tau_b(a, b) == pytest.approx(literal_tau_b(a, b))
    a = np.arange(4.0)
    assert kendall_tau_b(a, -a) == -1.0
    assert kendall_tau_b(a, 0 * a) == kendall_tau_b(a[:1], a[:1]) == 0.0


def test_ranking_agreement_of_a_small_gallery_and_of_nan():
    expected = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    same = compare_rankings(expected, expected)
    assert asdict(same) == {
        "top_k": 3, "mean_overlap": 1.0, "min_overlap": 1.0, "mean_tau": 1.0, "min_tau": 1.0
    }  # fmt: skip
    broken = compare_rankings(expected, np.array([[3.0, 2.0, 1.0], [np.nan] * 3]), top_k=2)
    assert (broken.min_overlap, broken.mean_overlap) == (0.0, 0.5)
    assert (broken.min_tau, broken.mean_tau) == (0.0, 0.5)


def test_preprocessing_that_differs_is_found_on_the_way_from_the_file(inputs):
    class UpsideDown:
        def encode_images(self, images, batch_size):
            turned = [np.array(Image.open(file).convert("RGB"))[::-1] for file in images]
            size = (WIDTH_PX, HEIGHT_PX)
            return honest("image", np.stack([Image.fromarray(a).resize(size) for a in turned]))

        def encode_texts(self, texts, batch_size):
            return honest("text", inputs.sentence_ids_NL)

    result = check(subject(honest, end_to_end=UpsideDown()), inputs)
    failing = {one.comparison.inputs for one in result.judged if one.fault}
    assert failing == {"files"}
    assert f"image {inputs.files[0].parent}" in result.message()


def test_both_towers_are_ranked_together(inputs):
    both = [one.comparison for one in check(subject(rotated_rows), inputs).judged
            if one.comparison.tower == "both"]  # fmt: skip
    assert [one.batch_size for one in both] == BATCH_SIZES
    assert all(one.ranking is not None for one in both)
    alone, *batches = [one.ranking.mean_tau for one in both if one.ranking]
    assert alone == 1.0
    assert max(batches) < 0.9


@pytest.mark.parametrize(
    ("value", "code"), [(np.nan, "reference_not_finite"), (0.25, "reference_constant")]
)
def test_a_broken_reference_and_embeddings_of_another_shape_are_refused(inputs, value, code):
    with refused(code, IntegrityError):
        make_reference(subject(lambda _, batch: np.full((len(batch), 16), value, "f4")), inputs)
    with refused("shape_differs", IntegrityError, found=(11, 8), expected=(11, 16)):
        check(subject(lambda tower, batch: honest(tower, batch)[:, :8]), inputs)


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


def alike(tower, batch):
    """Every two embeddings have cosine 0.99."""
    raw = 10 * np.ones(16) / 4 + honest(tower, batch)
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def alike_and_exchanged(tower, batch):
    return alike(tower, batch)[::-1]


SAME, EXCHANGED, NOT_FINITE = "same embedding", "has the embedding of", "no finite embedding"


@pytest.mark.parametrize(
    ("broken", "tolerance", "fault"),
    [
        (constant, LOOSE, SAME),
        (stale_rest, LOOSE, EXCHANGED),
        (alike_and_exchanged, LOOSE, EXCHANGED),
        (broken_once, LOOSE, NOT_FINITE),
    ],
)
def test_a_fault_that_no_tolerance_lets_pass(inputs, broken, tolerance, fault):
    expected = subject(alike if broken is alike_and_exchanged else honest)
    result = check(subject(broken, tolerance), inputs, expected)
    assert not result.ok
    assert result.would_pass() is None
    assert fault in result.message()
    assert "no tolerance" in result.message()


def test_what_is_not_finite_is_named_and_has_no_number_in_json(inputs):
    def one_broken(tower, batch):
        embeds = honest(tower, batch)
        if tower == "image":
            embeds[(batch == inputs.pixels_NHW3[7]).all(axis=(1, 2, 3))] = np.inf
        return embeds

    found = check(subject(one_broken), inputs).as_dict()
    assert f"image {inputs.image_names[7]} has {NOT_FINITE}" in found["worst"]["failure"]
    assert found["worst"]["to_reference"]["max_error"] is None
    assert (found["ok"], found["images"], found["captions"]) == (False, COUNT, COUNT)


def test_batches_are_held_to_items_alone_though_those_are_not_judged(inputs):
    def broken_alone(tower, batch):
        return honest(tower, batch) * np.float32(np.nan if len(batch) == 1 else 1)

    judged = check(subject(broken_alone), inputs)
    in_batches = replace(
        judged, judged=[one for one in judged.judged if one.comparison.batch_size == 8]
    )
    assert "by inf" in in_batches.message()
    assert in_batches.would_pass() is None


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


@pytest.fixture
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


def test_tolerances_come_from_the_table_the_manifest_or_the_user(bundle):
    def tolerances(given):
        backend = [BackendChoice("onnxruntime", "cpu")]
        return [one.tolerance for one in iter_bundle_subjects(bundle, backend, given)
                if isinstance(one, Subject)]  # fmt: skip

    assert tolerances(Tolerance()) == [Tolerance(max_error=1e-5), Tolerance(min_cosine=0.99)]
    later = replace(Bundle.open(bundle).entry, precision="later", canary_min_cosine=0.95)
    assert tolerance_of(later, Tolerance()) == Tolerance(min_cosine=0.95)
    assert tolerances(Tolerance(max_error=0.1, min_cosine=0.5)) == [
        Tolerance(max_error=0.1),
        Tolerance(min_cosine=0.5),
    ]


def test_a_variant_that_does_not_load_is_reported_and_the_rest_runs(bundle):
    replace_in_bundle(bundle, "image.int8.onnx", b"no graph")
    subjects = list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cpu")]))
    assert [type(one) for one in subjects] == [Subject, NotRun]
    assert isinstance(subjects[1], NotRun)
    assert subjects[1].variant == "int8"
    assert "cannot load" in subjects[1].reason


def test_backends_are_chosen_by_name_and_device():
    assert choose_backends([]) == [
        BackendChoice("onnxruntime", "cpu", named=False),
        BackendChoice("openvino", "cpu", named=False),
    ]
    assert choose_backends(["onnxruntime:cuda:1", "tensorrt", "tensorrt"]) == [
        BackendChoice("onnxruntime", "cuda:1"),
        BackendChoice("tensorrt", "cuda"),
    ]
    for name in ("auto", ""):
        with refused("backend_not_single", UsageError, found=name):
            choose_backends([name])


def test_a_reference_that_differs_from_its_golden_samples_is_refused(bundle, tmp_path):
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(bundle, "image.fp32.onnx", (other / "image.fp32.onnx").read_bytes())
    with pytest.raises(IntegrityError):
        bundle_reference(bundle)
