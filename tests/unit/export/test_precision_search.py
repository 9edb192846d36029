"""The accepted candidates of each tower, on made-up embeddings."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_export.precision_search import PrecisionSearch, RetrievalSplit, SplitEmbeds, r1_drop
from upperson_export.variants import AS_RUN, SIMULATED, VARIANTS
from upperson_rt.errors import AccuracyGateError, IntegrityError
from upperson_rt.metrics import PerQueryMetrics

PEOPLE = 40
FILES = [Path(f"{index}.jpg") for index in range(PEOPLE)]
SPLIT = RetrievalSplit(
    name="made up",
    image_files=FILES,
    image_pids=np.arange(PEOPLE),
    captions=["a man"] * PEOPLE,
    caption_pids=np.arange(PEOPLE),
)
UNKNOWN = RetrievalSplit(name="folder crops", image_files=FILES, captions=["a man"] * PEOPLE)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Source:
    """Embeddings of one picture and one caption a person, with the noise of a candidate."""

    def __init__(self, noise, elsewhere=None, exact=None):
        self._exact = unit(np.eye(PEOPLE) if exact is None else exact)
        self._noise = {AS_RUN: noise, SIMULATED: noise, "openvino": elsewhere or noise}
        self.measured = set()

    def __call__(self, tower, variant, candidate, backend):
        self.measured.add((candidate, backend))
        noise = self._noise[backend].get((tower, candidate), 0.0)
        if not np.isfinite(noise):
            raise IntegrityError(f"{tower} {candidate} gives values that are not finite")
        direction = np.roll(self._exact, 1, axis=0)  # Towards another person.
        float_type = "bf16" if backend == "openvino" and candidate != "fp32" else "f32"
        return SplitEmbeds(unit(self._exact + noise * direction), float_type)


def search(noise, elsewhere=None, split=SPLIT, max_r1_drop=0.5, exact=None, **options):
    source = Source(noise, elsewhere, exact)
    return PrecisionSearch(split=split, source=source, max_r1_drop=max_r1_drop, **options)


def everywhere(tower, noise, variant="int8"):
    return {(tower, candidate): noise for candidate in VARIANTS[variant].own_candidates}


def metrics(first_rank):
    rank = np.array(first_rank)
    return PerQueryMetrics(first_rank=rank, ap=1 / rank, inp=1 / rank)


def test_the_drop_is_paired_and_its_interval_contains_it():
    drop = r1_drop(metrics([1] * 60 + [3] * 40), metrics([1] * 57 + [2] * 3 + [1] + [3] * 39))
    assert drop.points == pytest.approx(2.0)
    assert drop.low < 2.0 < drop.high
    same = r1_drop(metrics([1, 2, 1]), metrics([1, 5, 1]))
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)


LOUD, NAN = 2.0, np.nan
ON_OPENVINO = {"also_on": ("openvino",)}


@pytest.mark.parametrize(
    ("variant", "noise", "options", "image", "text"),
    [
        ("int8", {}, {}, "plain", "plain"),
        ("int8", {}, {"max_r1_drop": 0.0}, "plain", "plain"),  # Just the limit is kept.
        ("int8", {}, {"max_r1_drop": -1.0}, "fp32", "fp32"),  # Float32 passes any limit.
        ("int8", {("image", "plain"): NAN}, {}, "smoothed", "plain"),
        ("int8-fp16", everywhere("image", LOUD, "int8-fp16"), {}, "fp16", "plain"),
        ("int8", everywhere("image", LOUD), {}, "fp32", "plain"),
        ("fp16", {("image", "fp16"): LOUD}, {}, "fp32", "fp16"),
        (
            "int8",
            {("image", "plain"): LOUD, ("image", "smoothed"): LOUD, ("text", "plain"): LOUD},
            {},
            "mixed-1/8",
            "smoothed",
        ),
        # Captions lose a little everywhere; pictures fail, but on OpenVINO alone.
        (
            "int8",
            everywhere("text", -0.6),
            {
                "elsewhere": everywhere("text", -0.6)
                | {("image", "plain"): NAN, ("image", "smoothed"): LOUD},
                **ON_OPENVINO,
            },
            "mixed-1/8",
            "plain",
        ),
    ],
)
def test_the_smallest_candidate_that_keeps_the_accuracy_is_accepted(
    variant, noise, options, image, text
):
    assert search(noise, **options).run(variant) == {"image": image, "text": text}


def test_measurements_are_kept_and_none_is_needless():
    found = search({("image", "plain"): LOUD})
    accepted = found.run("int8")
    assert found.source.measured == {
        ("fp32", AS_RUN), ("plain", AS_RUN), ("smoothed", AS_RUN)
    }  # fmt: skip
    rows = [(one.tower, one.candidate, one.accepted) for one in found.measured]
    assert rows == [
        ("image", "plain", False),
        ("image", "smoothed", True),
        ("text", "plain", True),
        ("both", "smoothed + plain", True),
    ]
    worst, both = found.measured[0].accuracy, found.measured[-1].accuracy
    assert worst.r1_drop.points == 100.0
    assert worst.cosine["median"] < 0.9
    assert worst.top10_overlap < 100.0
    assert (both.metrics.r1, both.top10_overlap) == (100.0, 100.0)
    assert both.cosine["min"] == pytest.approx(1.0)
    assert found.accuracy("int8", accepted) == {AS_RUN: both}


def test_towers_that_fail_only_together_are_searched_on():
    # A picture's own caption scores 1 - 0.8 * 0.5 = 0.6 then, another one 0.8; alone 1 and 0.8.
    found = search({("image", "plain"): 0.8, ("text", "plain"): -0.5})
    accepted = found.run("int8")
    rows = [(one.tower, one.candidate, one.accepted) for one in found.measured]
    assert rows[:3] == [
        ("image", "plain", True), ("text", "plain", True), ("both", "plain + plain", False)
    ]  # fmt: skip
    assert "smoothed" in accepted.values()
    assert found.measured[-1].accepted


def test_int8_keeps_its_accuracy_on_the_other_cpu_backend_too():
    elsewhere = {("image", "plain"): LOUD, ("image", "smoothed"): LOUD}
    found = search({}, elsewhere, **ON_OPENVINO)
    assert found.run("int8")["image"] == "mixed-1/8"
    assert found.measured[-1].accuracy.float_types == {"image": "bf16", "text": "bf16"}
    together = [
        (one.candidate.split(" + ")[0], one.backend, one.accepted)
        for one in found.measured
        if one.tower == "both"
    ]
    assert {("plain", "onnxruntime", True), ("plain", "openvino", False)} <= set(together)
    assert together[-2:] == [("mixed-1/8", "onnxruntime", True), ("mixed-1/8", "openvino", True)]
    for_gpus = search({}, **ON_OPENVINO)
    for_gpus.run("int8-fp16")
    assert {backend for _, backend in for_gpus.source.measured} == {AS_RUN, SIMULATED}


@pytest.mark.parametrize(
    ("noise", "options", "code", "where"),
    [
        (everywhere("text", LOUD), {}, "accuracy_not_kept", ("text", AS_RUN)),
        (everywhere("image", NAN), {}, "candidate_not_working", ("image", AS_RUN)),
        (
            {},
            {"elsewhere": everywhere("image", LOUD), **ON_OPENVINO},
            "accuracy_not_kept",
            ("both", "openvino"),
        ),
    ],
)
def test_int8_alone_fails_where_no_candidate_is_left(noise, options, code, where):
    with refused(code, AccuracyGateError, variant="int8") as found:
        search(noise, int8_only=True, **options).run("int8")
    fields = found.value.fields
    assert (fields["tower"], fields["backend"]) == where
    assert "mixed-1/2" in fields["candidate"]


def test_a_candidate_that_gives_no_numbers_has_no_accuracy_and_float32_must_give_some():
    found = search({("image", "plain"): NAN})
    found.run("int8")
    broken = found.measured[0]
    assert (broken.accepted, broken.accuracy) == (False, None)
    assert "not finite" in broken.failure
    with pytest.raises(IntegrityError, match="not finite"):
        search({("text", "fp32"): NAN})


def test_without_identities_rankings_decide():
    crowd = {"split": UNKNOWN, "exact": np.random.default_rng(0).normal(size=(PEOPLE, 64))}
    same = search({}, **crowd)
    same.run("int8")
    accuracy = same.measured[-1].accuracy
    assert (accuracy.top10_overlap, accuracy.metrics, accuracy.r1_drop) == (100.0, None, None)
    assert same.accuracy("fp32", {})[AS_RUN].metrics is None

    noise = {("image", "plain"): 1.0}
    found = search(noise, **crowd)
    assert found.run("int8")["image"] == "smoothed"
    assert 20 < found.measured[0].accuracy.top10_overlap < 90
    assert search(noise, min_overlap=20.0, **crowd).run("int8")["image"] == "plain"
    with refused("accuracy_not_kept", AccuracyGateError, tower="image"):
        search(everywhere("image", 1.0), int8_only=True, **crowd).run("int8")
