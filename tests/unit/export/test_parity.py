"""The parity report: measures by brute force, batches, and backends that lie."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

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
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import TOWERS, min_cosine, run_graph, toy_graph, toy_inputs
from upperson_export.graphs import build_variant
from upperson_export.parity.backend_choice import BackendChoice, choose_backends
from upperson_export.parity.bundle_subjects import bundle_reference, iter_bundle_subjects
from upperson_export.parity.check import (
    Comparison,
    count_comparisons,
    iter_comparisons,
    make_reference,
)
from upperson_export.parity.inputs import ParityInputs, iter_cases, length_buckets, read_inputs
from upperson_export.parity.pixel_paths import compare_pixels
from upperson_export.parity.ranking import compare_rankings, kendall_tau_b
from upperson_export.parity.report import ParityReport
from upperson_export.parity.subjects import (
    FP32_TOLERANCE,
    NotRun,
    Subject,
    Tolerance,
    export_towers,
    folded_towers,
    open_subject,
    torch_subject,
)
from upperson_export.parity.verdict import judge
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.tokenizer import Tokenizer

COUNT = 11
BATCH_SIZES = [1, 2, 8]
CAPTIONS = [f"a {'wo' * (n % 2)}man in a {colour} coat" for n, colour in enumerate(COLOURS)] * 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> ParityInputs:
    folder = tmp_path_factory.mktemp("people")
    colours = list(COLOURS) * 2
    files = [draw_person(folder / f"{n}.png", colours[n], seed=n) for n in range(COUNT)]
    tokenizer = Tokenizer.from_json(make_toy_tokenizer_json(), CONTEXT_LENGTH)
    return read_inputs(files, CAPTIONS[:COUNT], tokenizer, height_px=HEIGHT_PX, width_px=WIDTH_PX)


# --- measures ---


def literal_tau_b(a: np.ndarray, b: np.ndarray) -> float:
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


@pytest.mark.parametrize("levels", [3, 1000])
def test_tau_b_equals_its_definition_with_and_without_ties(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for length in (2, 5, 30):
        a, b = rng.integers(0, levels, (2, length)).astype(np.float32)
        if np.ptp(a) and np.ptp(b):
            assert kendall_tau_b(a, b) == pytest.approx(literal_tau_b(a, b))


def test_tau_b_of_known_rankings() -> None:
    a = np.array([1.0, 2.0, 3.0, 4.0])
    assert kendall_tau_b(a, a * 5 - 2) == 1.0
    assert kendall_tau_b(a, -a) == -1.0
    # One of six pairs is turned round: (5 - 1) / 6.
    assert kendall_tau_b(a, np.array([2.0, 1.0, 3.0, 4.0])) == pytest.approx(4 / 6)
    # Worked by hand: C = 5, D = 0, one pair tied in b only: 5 / sqrt(6 * 5).
    assert kendall_tau_b(a, np.array([1.0, 1.0, 3.0, 4.0])) == pytest.approx(5 / np.sqrt(30))
    assert kendall_tau_b(a, np.ones(4)) == 0.0
    assert kendall_tau_b(a[:1], a[:1]) == 0.0


def test_ranking_agreement_of_a_small_gallery_and_of_nan() -> None:
    expected = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    same = compare_rankings(expected, expected)
    assert same.as_dict() == {
        "top_k": 3, "mean_overlap": 1.0, "min_overlap": 1.0, "mean_tau": 1.0, "min_tau": 1.0
    }  # fmt: skip
    broken = compare_rankings(expected, np.array([[3.0, 2.0, 1.0], [np.nan] * 3]), top_k=2)
    assert (broken.min_overlap, broken.mean_overlap) == (0.0, 0.5)
    assert (broken.min_tau, broken.mean_tau) == (0.0, 0.5)


def test_pixels_are_compared_in_levels() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 2, 3), dtype=np.uint8)
    float32 = (pixels.astype(np.float32) / 255 - 0.48) / 0.27
    assert compare_pixels((float32 * 0.27 + 0.48) * 255, pixels, "abc").are_equal
    other = pixels.copy()
    other[1, 2, 0, 1] ^= 1
    found = compare_pixels(other, pixels, "abc")
    assert (found.max_difference, found.worst, found.are_equal) == (1.0, "b", False)
    assert "image b becomes other pixels" in found.message()


# --- inputs and batches ---


def test_texts_have_every_length_and_the_right_frame(inputs: ParityInputs) -> None:
    assert inputs.lengths.min() == 3
    assert inputs.lengths.max() == CONTEXT_LENGTH
    frame = Tokenizer.from_json(make_toy_tokenizer_json(), CONTEXT_LENGTH)
    for ids in inputs.ids:
        assert (ids[0], ids[-1]) == (frame.sot_id, frame.eot_id)
        assert not np.isin(ids[1:-1], [0, frame.sot_id, frame.eot_id]).any()
    # A text begins as its caption does.
    for sentence_ids, ids in zip(inputs.sentence_ids_NL, inputs.ids, strict=True):
        shared = min(len(ids), np.count_nonzero(sentence_ids)) - 1
        assert sentence_ids[:shared].tolist() == ids[:shared].tolist()


def test_buckets_share_out_all_texts(inputs: ParityInputs) -> None:
    buckets = length_buckets(inputs.lengths)
    assert list(buckets) == ["3-8", "9-12"]
    assert (sum(mask.astype(int) for mask in buckets.values()) == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 8, 32])
def test_every_item_is_in_a_batch_of_every_layout(inputs: ParityInputs, size: int) -> None:
    for tower in ("image", "text"):
        cases = list(iter_cases(inputs, tower, [size]))
        layouts = [case.layout for case in cases]
        expected = ["like"] if tower == "image" else ["like", "mixed", "padded"]
        assert layouts == [name for name in expected if size > 1 or name != "mixed"]
        for case in cases:
            assert set(np.concatenate(case.batches).tolist()) == set(range(COUNT))
            assert len(case.batches[0]) == size
            rest = COUNT % size if size < COUNT else size
            assert len(case.batches[-1]) == (rest or size)


def test_text_batches_are_sorted_mixed_and_padded(inputs: ParityInputs) -> None:
    like, mixed, padded = iter_cases(inputs, "text", [4])
    longest = [max(inputs.lengths[batch]) for batch in like.batches]
    assert longest == sorted(longest)
    spread = [np.ptp(inputs.lengths[batch]) for batch in mixed.batches]
    assert max(spread) > max(np.ptp(inputs.lengths[batch]) for batch in like.batches)
    for batch in padded.batches:
        ids = inputs.batch("text", batch, padded.width)
        assert ids.shape == (len(batch), CONTEXT_LENGTH)
        assert ids.dtype == np.int32
        for row, item in zip(ids, batch, strict=True):
            assert row[: inputs.lengths[item]].tolist() == inputs.ids[item].tolist()
            assert not row[inputs.lengths[item] :].any()


def test_nothing_to_compare_is_refused() -> None:
    tokenizer = Tokenizer.from_json(make_toy_tokenizer_json(), CONTEXT_LENGTH)
    with pytest.raises(InputError, match="at least one image and one caption, got 0 and 1"):
        read_inputs([], ["a man"], tokenizer, height_px=24, width_px=8)


# --- backends that lie ---

Embed = Callable[[str, np.ndarray], np.ndarray]


def honest(tower: str, batch: np.ndarray) -> np.ndarray:
    """Embed well: whatever the batch, and whatever the padding."""
    flat = batch.reshape(len(batch), -1).astype(np.float64)
    width = flat.shape[1]
    weights = np.random.default_rng(0).normal(size=(HEIGHT_PX * WIDTH_PX * 3, 16))[:width]
    raw = (flat / 255 - 0.5) @ weights if tower == "image" else flat @ weights
    return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)


def subject(embed: Embed, tolerance: Tolerance = FP32_TOLERANCE, **fields: Any) -> Subject:
    return Subject(variant="fp32", backend="fake 1.0", tolerance=tolerance, run=embed, **fields)


def report_on(one: Subject, inputs: ParityInputs, reference: Subject | None = None) -> ParityReport:
    expected = make_reference(reference or subject(honest), inputs)
    found = list(iter_comparisons(one, expected, inputs, BATCH_SIZES))
    assert len(found) == count_comparisons(inputs, BATCH_SIZES)
    return ParityReport(
        reference=expected.name,
        source="toys",
        inputs=inputs,
        batch_sizes=BATCH_SIZES,
        pixel_paths=compare_pixels(inputs.pixels_NHW3, inputs.pixels_NHW3, inputs.image_names),
        judged=[judge(comparison, one.tolerance, inputs) for comparison in found],
        not_run=[],
    )


def test_an_honest_backend_with_other_rounding_passes(inputs: ParityInputs) -> None:
    def rounded(tower: str, batch: np.ndarray) -> np.ndarray:
        return honest(tower, batch) + np.float32(2e-6 * (-1) ** len(batch))

    report = report_on(subject(rounded), inputs)
    assert report.ok
    assert report.message() == ""
    assert (report.worst, report.would_pass()) == (None, None)
    assert {one.comparison.inputs for one in report.judged} == {
        "all", "files", "3-8", "9-12", "mixed", "padded", "sentences"
    }  # fmt: skip


def constant(tower: str, batch: np.ndarray) -> np.ndarray:
    return np.full((len(batch), 16), 0.25, np.float32)


def rotated_rows(tower: str, batch: np.ndarray) -> np.ndarray:
    return np.roll(honest(tower, batch), 1, axis=0)


def wrong_in_batches(tower: str, batch: np.ndarray) -> np.ndarray:
    """Right alone, off in every batch, as if a shape had been frozen."""
    embeds = honest(tower, batch)
    return embeds if len(batch) == 1 else embeds + 0.1 * np.roll(embeds, 3, axis=1)


def stale_rest(tower: str, batch: np.ndarray) -> np.ndarray:
    """An odd last batch is answered from the first row of a full one."""
    embeds = honest(tower, batch)
    if len(batch) in (3, COUNT % 8):
        embeds[-1] = embeds[0]
    return embeds


def broken_once(tower: str, batch: np.ndarray) -> np.ndarray:
    embeds = honest(tower, batch)
    if len(batch) == 8:
        embeds[5] = np.nan
    return embeds


def sees_padding(tower: str, batch: np.ndarray) -> np.ndarray:
    embeds = honest(tower, batch)
    if tower == "text":
        embeds[:, 0] += 0.05 * (batch == 0).mean(axis=1)
    return embeds


LOOSE = Tolerance(min_cosine=0.9)


@pytest.mark.parametrize(
    ("liar", "tolerance", "text"),
    [
        (constant, FP32_TOLERANCE, "the same embedding"),
        (constant, LOOSE, "the same embedding"),
        (rotated_rows, FP32_TOLERANCE, "has the embedding of"),
        (rotated_rows, LOOSE, "has the embedding of"),
        (stale_rest, LOOSE, "has the embedding of"),
        (broken_once, LOOSE, "has no finite embedding"),
    ],
)
def test_a_lie_that_no_tolerance_makes_true(
    inputs: ParityInputs, liar: Embed, tolerance: Tolerance, text: str
) -> None:
    report = report_on(subject(liar, tolerance), inputs)
    assert not report.ok
    assert report.would_pass() is None
    assert text in report.message()
    assert "no tolerance makes this right" in report.message()


def test_rows_that_are_exchanged_are_found_even_if_all_people_look_alike(
    inputs: ParityInputs,
) -> None:
    """Where every two embeddings have cosine 0.99, the floor alone would let this pass."""

    def alike(tower: str, batch: np.ndarray) -> np.ndarray:
        raw = 10 * np.ones(16) / 4 + honest(tower, batch)
        return (raw / np.linalg.norm(raw, axis=1, keepdims=True)).astype(np.float32)

    def exchanged(tower: str, batch: np.ndarray) -> np.ndarray:
        return alike(tower, batch)[::-1]

    tolerance = Tolerance(min_cosine=0.9)
    expected = subject(alike)
    report = report_on(subject(exchanged, tolerance), inputs, expected)
    closest = [one.comparison.to_reference for one in report.judged]
    assert all(one is None or one.min_cosine > tolerance.min_cosine for one in closest)
    assert "has the embedding of" in report.message()
    assert report_on(subject(alike, tolerance), inputs, expected).ok


@pytest.mark.parametrize("floor", [None, 0.9999])
def test_wrong_only_in_batches_is_named_with_a_tolerance_that_passes(
    inputs: ParityInputs, floor: float | None
) -> None:
    tolerance = FP32_TOLERANCE if floor is None else Tolerance(min_cosine=floor)
    report = report_on(subject(wrong_in_batches, tolerance), inputs)
    failing = {one.comparison.batch_size for one in report.judged if one.fault}
    assert failing == {2, 8}
    message = report.message()
    assert "fp32 on fake 1.0, " in message
    assert " tower, batch " in message
    loosened = report.would_pass()
    assert loosened is not None
    (option,) = loosened
    assert option == ("max_error" if floor is None else "min_cosine")
    assert f"--{option.replace('_', '-')} {loosened[option]:g} would pass" in message
    assert report_on(subject(wrong_in_batches, Tolerance(**loosened)), inputs).ok
    tight = {"max_error": loosened[option] / 1.2, "min_cosine": 1 - (1 - loosened[option]) / 1.2}
    assert not report_on(subject(wrong_in_batches, Tolerance(**{option: tight[option]})), inputs).ok


def test_padding_that_matters_is_named(inputs: ParityInputs) -> None:
    report = report_on(subject(sees_padding), inputs)
    failing = {(one.comparison.tower, one.comparison.inputs) for one in report.judged if one.fault}
    assert failing >= {("text", "padded"), ("text", "mixed")}
    assert {tower for tower, _ in failing} == {"text"}
    assert not [one for one in report.judged if one.fault and one.comparison.batch_size == 1
                and one.comparison.inputs != "padded"]  # fmt: skip
    assert 'caption 0 "a man in a red coat" made 3 tokens long' in report.message()
    assert "padded to the context" in report.message()


def test_preprocessing_that_differs_is_found_on_the_way_from_the_file(
    inputs: ParityInputs,
) -> None:
    def encode(tower: str, given: ParityInputs, batch_size: int) -> np.ndarray:
        if tower == "text":
            return honest(tower, given.sentence_ids_NL)
        upside_down = [np.array(Image.open(file).convert("RGB"))[::-1] for file in given.files]
        size = (WIDTH_PX, HEIGHT_PX)
        return honest(tower, np.stack([Image.fromarray(a).resize(size) for a in upside_down]))

    report = report_on(subject(honest, encode=encode), inputs)
    failing = {one.comparison.inputs for one in report.judged if one.fault}
    assert failing == {"files"}
    assert f"image {inputs.files[0].parent}" in report.message()


def test_both_towers_are_ranked_together(inputs: ParityInputs) -> None:
    both = [one.comparison for one in report_on(subject(rotated_rows), inputs).judged
            if one.comparison.tower == "both"]  # fmt: skip
    assert [one.batch_size for one in both] == BATCH_SIZES
    assert all(one.ranking is not None for one in both)
    alone, *batches = [one.ranking.mean_tau for one in both if one.ranking]
    assert alone == 1.0
    assert max(batches) < 0.9


def test_a_suggested_tolerance_holds_for_all_variants(inputs: ParityInputs) -> None:
    """A stricter floor of one variant must not become that of a worse one that had passed."""

    def noisy(size: float) -> Embed:
        def embed(tower: str, batch: np.ndarray) -> np.ndarray:
            embeds = honest(tower, batch)
            return (embeds + size * np.sign(embeds)).astype(np.float32)

        return embed

    strict, loose = Tolerance(min_cosine=0.9999), Tolerance(min_cosine=0.5)
    one = report_on(subject(noisy(0.02), strict), inputs)
    other = report_on(subject(noisy(0.05), loose), inputs)
    assert not one.ok
    assert other.ok
    together = ParityReport(
        reference="", source="", inputs=inputs, batch_sizes=BATCH_SIZES,
        pixel_paths=one.pixel_paths, judged=[*one.judged, *other.judged], not_run=[],
    )  # fmt: skip
    loosened = together.would_pass()
    assert loosened is not None
    for size in (0.02, 0.05):
        assert report_on(subject(noisy(size), Tolerance(**loosened)), inputs).ok


@pytest.mark.parametrize("value", [np.nan, 0.25])
def test_a_reference_that_is_broken_itself_is_refused(inputs: ParityInputs, value: float) -> None:
    def broken(tower: str, batch: np.ndarray) -> np.ndarray:
        return np.full((len(batch), 16), value, np.float32)

    match = "no finite embedding" if np.isnan(value) else "every image the same embedding"
    with pytest.raises(IntegrityError, match=match):
        make_reference(subject(broken), inputs)


def test_embeddings_of_another_shape_are_refused(inputs: ParityInputs) -> None:
    def short(tower: str, batch: np.ndarray) -> np.ndarray:
        return honest(tower, batch)[:, :8]

    with pytest.raises(IntegrityError, match=r"shape \(11, 8\), expected \(11, 16\)"):
        report_on(subject(short), inputs)


def test_a_dict_of_the_report_is_plain(inputs: ParityInputs) -> None:
    result = report_on(subject(broken_once), inputs).as_dict()
    assert result["ok"] is False
    assert result["worst"]["failure"].endswith("has no finite embedding")
    assert result["worst"]["to_reference"]["max_error"] is None
    assert result["worst"]["batch_size"] == 8
    assert result["images"] == result["captions"] == COUNT
    assert result["preprocessing"]["equal"] is True


# --- bundles and exports ---


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_toy_bundle(tmp_path / "bundle")


def bundle_comparisons(bundle: Path, inputs: ParityInputs, **options: Any) -> list[Comparison]:
    reference = make_reference(bundle_reference(bundle, threads=1), inputs)
    found = []
    for one in iter_bundle_subjects(bundle, choose_backends([]), threads=1, **options):
        assert isinstance(one, Subject)
        found += iter_comparisons(one, reference, inputs, BATCH_SIZES)
    return found


def test_every_variant_runs_on_every_backend(bundle: Path, inputs: ParityInputs) -> None:
    found = bundle_comparisons(bundle, inputs)
    backends = ["onnxruntime", "openvino"]
    assert list(dict.fromkeys((one.variant, one.backend.split()[0]) for one in found)) == [
        (variant, backend) for variant in ("fp32", "int8") for backend in backends
    ]
    for one in found:
        if one.to_reference is not None:
            assert one.to_reference.max_error < (1e-5 if one.variant == "fp32" else 0.5)
            assert one.not_finite is None
        assert (one.to_alone is None) == (
            one.tower == "both"
            or one.inputs in ("files", "sentences")
            or (one.batch_size == 1 and one.inputs != "padded")
        )
    int8 = [one.to_reference for one in found if one.variant == "int8" and one.to_reference]
    assert max(one.max_error for one in int8) > 1e-4


def test_tolerances_come_from_the_manifest_or_from_the_user(bundle: Path) -> None:
    def tolerances(**options: Any) -> list[Tolerance]:
        backend = [BackendChoice("onnxruntime", "cpu")]
        return [one.tolerance for one in iter_bundle_subjects(bundle, backend, **options)
                if isinstance(one, Subject)]  # fmt: skip

    assert tolerances() == [Tolerance(max_error=1e-5), Tolerance(min_cosine=0.9999)]
    assert tolerances(max_error=0.1, min_cosine=0.5) == [
        Tolerance(max_error=0.1),
        Tolerance(min_cosine=0.5),
    ]


def test_a_variant_that_does_not_load_is_reported_and_the_rest_runs(bundle: Path) -> None:
    replace_in_bundle(bundle, "image.int8.onnx", b"no graph")
    subjects = list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cpu")]))
    assert [type(one) for one in subjects] == [Subject, NotRun]
    assert isinstance(subjects[1], NotRun)
    assert subjects[1].variant == "int8"
    assert "cannot load" in subjects[1].reason


def test_a_backend_that_was_asked_for_and_runs_nothing_is_an_error(bundle: Path) -> None:
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        list(iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda")]))
    with pytest.raises(UsageError, match="no backend 'onxruntime'"):
        list(iter_bundle_subjects(bundle, [BackendChoice("onxruntime", "cpu")]))
    unasked = iter_bundle_subjects(bundle, [BackendChoice("onnxruntime", "cuda", asked=False)])
    assert [type(one) for one in unasked] == [NotRun, NotRun]


def test_backends_are_chosen_by_name_and_device() -> None:
    assert [(one.name, one.device, one.asked) for one in choose_backends([])] == [
        ("onnxruntime", "cpu", False),
        ("openvino", "cpu", False),
    ]
    assert choose_backends(["onnxruntime:cuda:1", "tensorrt", "tensorrt"]) == [
        BackendChoice("onnxruntime", "cuda:1"),
        BackendChoice("tensorrt", "cuda"),
    ]
    for name in ("auto", ""):
        with pytest.raises(UsageError, match="is no backend to compare"):
            choose_backends([name])


def test_a_bundle_whose_reference_fails_its_canaries_is_refused(
    bundle: Path, tmp_path: Path
) -> None:
    other = make_toy_bundle(tmp_path / "other", seed=5)
    replace_in_bundle(bundle, "image.fp32.onnx", (other / "image.fp32.onnx").read_bytes())
    with pytest.raises(IntegrityError, match="canary"):
        bundle_reference(bundle)


def test_a_trained_model_its_folded_towers_and_its_export_agree(
    inputs: ParityInputs, tmp_path: Path
) -> None:
    model = toy_model(seed=3)
    rng = np.random.default_rng(0)
    ids = [np.array([49406, *rng.integers(1, 49000, n), 49407], np.int32) for n in (1, 5, 30, 75)]
    pixels = rng.integers(0, 256, (4, *model.image_size, 3), dtype=np.uint8)
    given = ParityInputs(
        files=inputs.files[:4],
        image_names=list("abcd"),
        pixels_NHW3=pixels,
        sentences=inputs.sentences[:4],
        sentence_ids_NL=inputs.sentence_ids_NL[:4],
        ids=ids,
        context_length=77,
    )
    towers = folded_towers(model)
    reference = torch_subject("folded", towers)
    paths = export_towers(towers, given, tmp_path)
    exported, _ = open_subject("fp32", paths, BackendChoice("onnxruntime", "cpu"), threads=1)
    report = report_on(exported, given, reference)
    assert report.ok, report.message()
    assert "torch " + torch.__version__ in report.reference


def test_a_cpu_compares_what_float16_does_to_a_typed_variant(tmp_path: Path) -> None:
    exact, paths = toy_graph("image"), {}
    for kind in TOWERS:
        paths[kind] = tmp_path / f"{kind}.fp16.onnx"
        onnx.save(build_variant(toy_graph(kind), kind, "fp16"), paths[kind])
    subject, _ = open_subject("fp16", paths, BackendChoice("onnxruntime", "cpu"), threads=1)
    assert subject.backend.endswith("on cpu, float16 simulated")
    images = toy_inputs("image")
    expected, computed_in_float32 = (
        run_graph(model, images)[0] for model in (exact, onnx.load(paths["image"]))
    )
    found = subject.run("image", images)
    # Rounded weights alone are closer than rounded weights and results.
    assert min_cosine(found, expected) > 0.999
    assert np.abs(found - expected).max() > 1.2 * np.abs(computed_in_float32 - expected).max()
