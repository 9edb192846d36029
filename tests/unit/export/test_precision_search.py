"""The accepted candidates of each tower, on made-up embeddings."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson.attributes import measure_attributes
from upperson.cli.exportable import retrieval_split
from upperson.data.records import Record
from upperson_export.precision_search import (
    Drop,
    PrecisionSearch,
    RetrievalSplit,
    ShortQueries,
    SplitEmbeds,
    paired_drop,
)
from upperson_export.variants import AS_RUN, SIMULATED, VARIANTS
from upperson_rt.errors import AccuracyGateError, IntegrityError

PEOPLE = 40
FILES = [Path(f"{index}.jpg") for index in range(PEOPLE)]
SPLIT = RetrievalSplit(
    name="made up",
    image_files=FILES,
    image_pids=np.arange(PEOPLE),
    captions=["a man"] * PEOPLE,
    caption_pids=np.arange(PEOPLE),
)
COUPLE = np.arange(PEOPLE) // 2
WITH_SHORT = replace(SPLIT, short=ShortQueries(["man in red coat"] * (PEOPLE // 2), COUPLE))
"""Each short query is satisfied by two people."""
UNKNOWN = RetrievalSplit(name="folder crops", image_files=FILES, captions=["a man"] * PEOPLE)


def unit(rows):
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Source:
    """Embeddings of one picture and one caption a person, with the noise of a candidate.

    ``short`` are the short queries that the int8 text tower takes for other ones.
    """

    def __init__(self, noise, elsewhere=None, exact=None, short=()):
        self._exact = unit(np.eye(PEOPLE) if exact is None else exact)
        self._short = list(short)
        self._noise = {AS_RUN: noise, SIMULATED: noise, "openvino": elsewhere or noise}
        self.measured = set()

    def __call__(self, tower, variant, candidate, backend):
        self.measured.add((candidate, backend))
        noise = self._noise[backend].get((tower, candidate), 0.0)
        if not np.isfinite(noise):
            raise IntegrityError(f"{tower} {candidate} gives values that are not finite")
        direction = np.roll(self._exact, 1, axis=0)  # Towards another person.
        float_type = "bf16" if backend == "openvino" and candidate != "fp32" else "f32"
        rows = unit(self._exact + noise * direction)
        if tower == "text":
            short = unit(self._exact[::2] + self._exact[1::2])
            if candidate in VARIANTS["int8"].own_candidates:
                short[self._short] = np.roll(short, 1, axis=0)[self._short]
            rows = np.concatenate([rows, short])
        return SplitEmbeds(rows, float_type)


def search(noise, elsewhere=None, split=SPLIT, max_r1_drop=0.5, exact=None, short=(), **options):
    source = Source(noise, elsewhere, exact, short)
    return PrecisionSearch(split=split, source=source, max_r1_drop=max_r1_drop, **options)


def everywhere(tower, noise, variant="int8"):
    return {(tower, candidate): noise for candidate in VARIANTS[variant].own_candidates}


def test_the_drop_is_paired_and_its_interval_contains_it():
    lost = np.zeros(100)
    lost[57:60], lost[60] = 1, -1
    drop = paired_drop(lost, np.arange(100))
    assert drop.points == pytest.approx(2.0)
    assert drop.low < 2.0 < drop.high
    assert drop == paired_drop(lost, np.arange(100))
    # A person counts as often as it has captions.
    drop = paired_drop(np.array([1.0, 1.0, 1.0, 0.0]), np.array([4, 4, 4, 9]))
    assert (drop.points, drop.low, drop.high) == (75.0, 0.0, 100.0)


def test_people_are_resampled_so_copies_of_captions_do_not_narrow_the_interval():
    def drop(copies, people):
        def source(tower, variant, candidate, backend):
            rows = np.eye(PEOPLE, dtype=np.float32)
            if tower == "text":  # Captions of half of the people are lost.
                rows[::2] = np.roll(rows, candidate == "plain", axis=1)[::2]
                rows = np.repeat(rows, copies, axis=0)
            return SplitEmbeds(rows, "f32")

        split = replace(SPLIT, captions=["a man"] * (PEOPLE * copies), caption_pids=people)
        found = PrecisionSearch(split=split, source=source, max_r1_drop=0.5)
        found.run("int8")
        return found.measured[1].accuracy.drops["R@1"]

    once = drop(1, SPLIT.caption_pids)
    ten = drop(10, np.repeat(SPLIT.caption_pids, 10))
    assert 0 < once.low < once.points < once.high
    assert (ten.points, ten.low, ten.high) == pytest.approx((once.points, once.low, once.high))
    # Captions that are taken for people would narrow it.
    lost = np.repeat(np.arange(PEOPLE) % 2, 10)
    as_people = paired_drop(lost, np.arange(len(lost)))
    of_people = paired_drop(lost, np.repeat(np.arange(0, 7 * PEOPLE, 7), 10))
    assert as_people.high - as_people.low < (of_people.high - of_people.low) / 2


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
    assert worst.drops["R@1"].points == 100.0
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
    assert (accuracy.top10_overlap, accuracy.metrics, accuracy.drops) == (100.0, None, {})
    assert same.accuracy("fp32", {})[AS_RUN].metrics is None

    noise = {("image", "plain"): 1.0}
    found = search(noise, **crowd)
    assert found.run("int8")["image"] == "smoothed"
    assert 20 < found.measured[0].accuracy.top10_overlap < 90
    assert search(noise, min_overlap=20.0, **crowd).run("int8")["image"] == "plain"
    with refused("accuracy_not_kept", AccuracyGateError, tower="image"):
        search(everywhere("image", 1.0), int8_only=True, **crowd).run("int8")


def test_a_variant_that_keeps_captions_and_loses_short_queries_is_refused():
    spoilt = {"split": WITH_SHORT, "short": range(5)}
    one = search({}, split=WITH_SHORT, short=[0])  # One query chance may have lost.
    assert one.run("int8") == {"image": "plain", "text": "plain"}
    assert one.measured[-1].accuracy.drops["short R@1"].points == 5.0
    unseen = search({}, short=range(5))  # The same variant where attributes are unknown.
    assert unseen.run("int8") == {"image": "plain", "text": "plain"}
    found = search({}, **spoilt)
    assert found.run("int8") == {"image": "plain", "text": "fp32"}
    row = found.measured[1]
    drops = row.accuracy.drops
    assert (row.tower, row.failed_by, drops["R@1"].points) == ("text", "short R@1", 0.0)
    assert drops["mAP"].points == 0.0
    assert drops["short R@1"].points == 25.0
    assert 0.5 < drops["short R@1"].low < 25.0 < drops["short R@1"].high
    assert found.accuracy("fp32", {})[AS_RUN].short.r1 == 100.0
    assert "short R@1" in found.refusals("int8")
    with refused("accuracy_not_kept", AccuracyGateError, measure="short R@1", limit=0.5) as error:
        search({}, int8_only=True, **spoilt).run("int8")
    assert (error.value.exit_code, error.value.fields["points"]) == (4, 25.0)
    assert 0.5 < error.value.fields["low"] < error.value.fields["high"]
    assert search({}, max_r1_drop=60.0, int8_only=True, **spoilt).run("int8")["text"] == "plain"


def test_short_queries_are_those_that_the_evaluation_measures():
    def records():
        """Two pictures a person; children and missing clothes are not asked for."""
        return [
            Record(
                image=Path(f"{pid}_{view}.jpg"),
                pid=pid,
                captions=(f"person {pid}",),
                attributes={
                    "gender": ("man", "woman", "girl")[pid % 3],
                    "upper": ("coat", "shirt", None)[pid % 5 % 3],
                    "upper_colour": ("red", "blue", "navy", "red")[pid % 4],
                },
            )
            for pid in range(PEOPLE)
            for view in range(2)
        ]

    def embed(texts):
        seeds = (list(text.encode()) for text in texts)
        return unit([np.random.default_rng(seed).normal(size=16) for seed in seeds])

    split = retrieval_split(records(), "test")
    assert {-1, 0} < set(split.short.satisfied_G.tolist())
    images = embed(map(str, split.image_files))
    rows = {"image": images, "text": embed(split.texts)}
    found = PrecisionSearch(
        split=split, source=lambda tower, *_: SplitEmbeds(rows[tower], "f32"), max_r1_drop=0.5
    ).accuracy("fp32", {})[AS_RUN]
    captions = embed(split.captions)
    expected = measure_attributes(records(), captions, images, embed).short["person"]
    assert len(split.short.texts) == expected.present > 5
    assert found.short.r1 == pytest.approx(expected.parts["all"].top1)
    assert found.short.map == pytest.approx(expected.map)
    (first, *others) = records()  # Without attributes nobody knows what is right.
    assert retrieval_split([replace(first, attributes=None), *others], "test").short is None


def test_map_is_limited_as_r1_is():
    # Each person has a second picture. A candidate keeps the first one, and R@1 with it.
    twice = replace(SPLIT, image_files=FILES * 2, image_pids=np.concatenate([SPLIT.image_pids] * 2))
    exact = np.eye(PEOPLE, dtype=np.float32)

    def source(tower, variant, candidate, backend):
        second = exact if candidate == "fp32" else np.roll(exact, 1, axis=0)
        rows = np.concatenate([exact, second]) if tower == "image" else exact
        return SplitEmbeds(rows, "f32")

    found = PrecisionSearch(split=twice, source=source, max_r1_drop=0.5)
    assert found.run("int8") == {"image": "fp32", "text": "plain"}
    refused_row = found.measured[0]
    assert (refused_row.failed_by, refused_row.accuracy.drops["R@1"].points) == ("mAP", 0.0)
    assert refused_row.accuracy.drops["mAP"].points > 0.5


@pytest.mark.parametrize(
    ("drops", "overlap", "by"),
    [
        ({"R@1": Drop(0.6, 0.1, 1.1)}, 100.0, "R@1"),
        ({"R@1": Drop(0.5, 0.1, 1.1)}, 100.0, None),
        ({"short R@1": Drop(0.6, 0.1, 1.1)}, 100.0, None),
        ({"short R@1": Drop(0.8, 0.6, 1.1)}, 100.0, "short R@1"),
        ({}, 89.9, "top 10"),
        ({}, 90.0, None),
    ],
)
def test_the_gate_refuses_just_beyond_its_limits(drops, overlap, by):
    found = SimpleNamespace(drops=drops, top10_overlap=overlap)
    assert search({})._judge(found)[0] == by
