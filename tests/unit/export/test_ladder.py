"""Which form of each tower is chosen, decided on made-up embeddings."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from upperson_export.ladder import Compared, Ladder, Measured, RetrievalSplit, SplitEmbeds, r1_drop
from upperson_export.variants import AS_RUN, INT8_RUNGS, SIMULATED, VARIANTS, VariantName
from upperson_rt.errors import AccuracyGateError, IntegrityError
from upperson_rt.metrics import PerQueryMetrics
from upperson_rt.towers import Tower

PEOPLE = 40


def unit(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Forms:
    """Embeddings of one picture and one caption a person, with noise that a form adds."""

    def __init__(
        self,
        noise: dict[tuple[Tower, str], float],
        elsewhere: dict[tuple[Tower, str], float] | None = None,
    ) -> None:
        self._exact = unit(np.eye(PEOPLE))
        self._noise = {AS_RUN: noise, SIMULATED: noise, "openvino": elsewhere or noise}
        self.asked: list[tuple[Tower, VariantName, str, str]] = []

    def __call__(self, tower: Tower, variant: VariantName, rung: str, backend: str) -> SplitEmbeds:
        self.asked.append((tower, variant, rung, backend))
        noise = self._noise[backend].get((tower, rung), 0.0)
        if not np.isfinite(noise):
            raise IntegrityError(f"{tower} {rung} gives values that are not finite")
        direction = np.roll(self._exact, 1, axis=0)  # Towards another person.
        float_type = "bf16" if backend == "openvino" and rung != "fp32" else "f32"
        return SplitEmbeds(unit(self._exact + noise * direction), float_type)


def ladder_of(forms: Forms, **options: object) -> Ladder:
    split = RetrievalSplit(
        name="made up",
        image_files=[Path(f"{index}.jpg") for index in range(PEOPLE)],
        image_pids=np.arange(PEOPLE),
        captions=["a man"] * PEOPLE,
        caption_pids=np.arange(PEOPLE),
    )
    return Ladder(split=split, source=forms, max_r1_drop=0.5, **options)  # type: ignore[arg-type]


def accuracy_of(measured: Measured) -> Compared:
    assert measured.accuracy is not None
    return measured.accuracy


def metrics(first_rank: list[int]) -> PerQueryMetrics:
    rank = np.array(first_rank)
    return PerQueryMetrics(first_rank=rank, ap=1 / rank, inp=1 / rank)


def test_the_drop_is_paired_and_its_interval_contains_it() -> None:
    drop = r1_drop(metrics([1] * 60 + [3] * 40), metrics([1] * 57 + [2] * 3 + [1] + [3] * 39))
    assert drop.points == pytest.approx(2.0)
    assert drop.low < 2.0 < drop.high
    same = r1_drop(metrics([1, 2, 1]), metrics([1, 5, 1]))
    assert (same.points, same.low, same.high) == (0.0, 0.0, 0.0)


def test_the_first_rung_is_taken_where_it_keeps_the_accuracy() -> None:
    ladder = ladder_of(Forms({}))
    assert ladder.climb("int8") == {"image": "plain", "text": "plain"}
    assert [found.tower for found in ladder.measured] == ["image", "text", "both"]
    assert all(found.accepted for found in ladder.measured)
    both = accuracy_of(ladder.measured[-1])
    assert both.metrics.r1 == 100.0
    assert both.top10_overlap == 100.0
    assert both.cosine["min"] == pytest.approx(1.0)
    assert ladder.accuracy("int8", {"image": "plain", "text": "plain"}) == {AS_RUN: both}


def test_a_loss_of_just_what_is_allowed_is_kept() -> None:
    ladder = ladder_of(Forms({}))
    ladder.max_r1_drop = 0.0
    assert ladder.climb("int8") == {"image": "plain", "text": "plain"}


def test_a_tower_climbs_alone_as_far_as_it_must() -> None:
    forms = Forms({("image", "plain"): 2.0, ("image", "smoothed"): 2.0, ("text", "plain"): 2.0})
    ladder = ladder_of(forms)
    assert ladder.climb("int8") == {"image": "mixed-1/8", "text": "smoothed"}
    refused = [(found.tower, found.rung) for found in ladder.measured if not found.accepted]
    assert refused == [("image", "plain"), ("image", "smoothed"), ("text", "plain")]
    worst = accuracy_of(ladder.measured[0])
    assert worst.r1_drop.points == 100.0
    assert worst.cosine["median"] < 0.9
    assert worst.top10_overlap < 100.0


def test_towers_that_fail_only_together_climb_on() -> None:
    # A picture's own caption scores 1 - 0.8 * 0.5 = 0.6 then, another one 0.8; alone 1 and 0.8.
    forms = Forms({("image", "plain"): 0.8, ("text", "plain"): -0.5})
    ladder = ladder_of(forms)
    chosen = ladder.climb("int8")
    rungs = [(found.tower, found.rung, found.accepted) for found in ladder.measured]
    assert rungs[:2] == [("image", "plain", True), ("text", "plain", True)]
    assert rungs[2][0] == "both"
    assert not rungs[2][2]
    assert "smoothed" in chosen.values()
    assert ladder.measured[-1].accepted


def test_float_is_the_last_resort_of_a_tower() -> None:
    noise: dict[tuple[Tower, str], float] = {
        ("image", rung): 2.0 for rung in VARIANTS["int8-fp16"].own_rungs
    }
    ladder = ladder_of(Forms(noise))
    assert ladder.climb("int8-fp16") == {"image": "fp16", "text": "plain"}
    assert ladder.climb("int8") == {"image": "fp32", "text": "plain"}


def test_where_int8_is_insisted_on_float_is_no_way_out() -> None:
    noise: dict[tuple[Tower, str], float] = {
        ("text", rung): 2.0 for rung in VARIANTS["int8"].own_rungs
    }
    with pytest.raises(AccuracyGateError, match=r"text: mixed-1/2.*--precision auto"):
        ladder_of(Forms(noise), int8_only=True).climb("int8")


def test_fp16_may_fall_back_to_fp32() -> None:
    ladder = ladder_of(Forms({("image", "fp16"): 2.0}))
    assert ladder.climb("fp16") == {"image": "fp32", "text": "fp16"}


def test_float32_is_a_way_out_of_any_limit() -> None:
    ladder = ladder_of(Forms({}))
    ladder.max_r1_drop = -1.0
    assert ladder.climb("int8") == {"image": "fp32", "text": "fp32"}


def test_nothing_is_measured_that_is_not_needed() -> None:
    forms = Forms({})
    ladder_of(forms).climb("int8")
    assert {rung for _, _, rung, _ in forms.asked} == {"fp32", "plain"}


def test_what_ships_keeps_its_accuracy_on_the_other_backend_too() -> None:
    forms = Forms({}, elsewhere={("image", "plain"): 2.0, ("image", "smoothed"): 2.0})
    ladder = ladder_of(forms, also_on=("openvino",))
    assert ladder.climb("int8")["image"] == "mixed-1/8"
    assert accuracy_of(ladder.measured[-1]).float_types == {"image": "bf16", "text": "bf16"}
    together = [
        (found.rung.split(" + ")[0], found.backend, found.accepted)
        for found in ladder.measured
        if found.tower == "both"
    ]
    assert ("plain", "onnxruntime", True) in together
    assert ("plain", "openvino", False) in together
    assert together[-2:] == [
        ("mixed-1/8", "onnxruntime", True),
        ("mixed-1/8", "openvino", True),
    ]


def test_graphs_for_gpus_are_not_measured_on_a_cpu_backend() -> None:
    forms = Forms({})
    ladder_of(forms, also_on=("openvino",)).climb("int8-fp16")
    assert {backend for *_, backend in forms.asked} == {AS_RUN, SIMULATED}


def test_an_int8_that_only_fails_elsewhere_says_where() -> None:
    elsewhere: dict[tuple[Tower, str], float] = {("image", rung): 2.0 for rung in INT8_RUNGS}
    ladder = ladder_of(Forms({}, elsewhere=elsewhere), also_on=("openvino",), int8_only=True)
    with pytest.raises(AccuracyGateError, match="on openvino"):
        ladder.climb("int8")


def test_a_form_that_gives_no_numbers_is_refused_and_the_next_one_tried() -> None:
    ladder = ladder_of(Forms({("image", "plain"): np.nan}))
    assert ladder.climb("int8") == {"image": "smoothed", "text": "plain"}
    broken = ladder.measured[0]
    assert not broken.accepted
    assert broken.accuracy is None
    assert "not finite" in str(broken.failure)
    with pytest.raises(AccuracyGateError, match=r"does not work .*not finite"):
        ladder_of(Forms({("image", rung): np.nan for rung in INT8_RUNGS}), int8_only=True).climb(
            "int8"
        )


def test_float32_that_gives_no_numbers_is_an_error_of_its_own() -> None:
    with pytest.raises(IntegrityError, match="not finite"):
        ladder_of(Forms({("text", "fp32"): np.nan}))


def test_the_tower_that_fails_on_the_other_backend_climbs_there() -> None:
    # Captions lose a little everywhere; pictures fail, but on OpenVINO alone.
    noise: dict[tuple[Tower, str], float] = {("text", rung): -0.6 for rung in INT8_RUNGS}
    broken: dict[tuple[Tower, str], float] = {("image", "plain"): np.nan, ("image", "smoothed"): 2}
    ladder = ladder_of(Forms(noise, elsewhere={**noise, **broken}), also_on=("openvino",))
    assert ladder.climb("int8") == {"image": "mixed-1/8", "text": "plain"}


class Crowd(Forms):
    """Forms of pictures and sentences of which nobody knows who belongs to whom."""

    def __init__(self, noise: dict[tuple[Tower, str], float]) -> None:
        super().__init__(noise)
        self._exact = unit(np.random.default_rng(0).normal(size=(PEOPLE, 64)))


def test_without_identities_rankings_decide() -> None:
    nobody = RetrievalSplit(
        name="folder crops",
        image_files=[Path(f"{index}.jpg") for index in range(PEOPLE)],
        captions=["a man"] * PEOPLE,
    )

    def climbed(noise: dict[tuple[Tower, str], float], **options: object) -> Ladder:
        ladder = Ladder(split=nobody, source=Crowd(noise), max_r1_drop=0.5, **options)  # type: ignore[arg-type]
        ladder.climb("int8")
        return ladder

    same = climbed({})
    assert accuracy_of(same.measured[-1]).top10_overlap == 100.0
    assert accuracy_of(same.measured[-1]).metrics is None
    assert accuracy_of(same.measured[-1]).r1_drop is None
    assert same.accuracy("fp32", {})[AS_RUN].metrics is None

    loud: dict[tuple[Tower, str], float] = {("image", "plain"): 1.0}
    ladder = climbed(loud)
    first, second, *_ = ladder.measured
    assert 20 < accuracy_of(first).top10_overlap < 90
    assert (first.rung, first.accepted, second.rung, second.accepted) == (
        "plain", False, "smoothed", True,
    )  # fmt: skip
    assert climbed(loud, min_overlap=20.0).measured[0].accepted
    everywhere: dict[tuple[Tower, str], float] = {("image", rung): 1.0 for rung in INT8_RUNGS}
    with pytest.raises(AccuracyGateError, match=r"first ten pictures .*lower --min-overlap"):
        climbed(everywhere, int8_only=True)
