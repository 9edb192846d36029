"""What ``report.json`` holds, and the tables that people read."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token

from upperson_calibration.calibration_file import SampleHashes, Samples
from upperson_calibration.sensitivity import LayerDamage
from upperson_export.graphs import HalfSums
from upperson_export.ladder import Accuracy, Compared, Drop, Measured
from upperson_export.pages import (
    accuracy_table,
    float_linear_table,
    ladder_table,
    model_card,
    report_html,
)
from upperson_export.report import (
    CalibrationRecord,
    Conditions,
    ExportReport,
    SplitSize,
    TowerTime,
    VariantReport,
)
from upperson_export.variants import SIMULATED
from upperson_rt.manifest import (
    NO_ADAPTER,
    FileEntry,
    ImageSection,
    Manifest,
    ModelSection,
    TextSection,
    VariantEntry,
    space_fingerprint,
)
from upperson_rt.metrics import RetrievalMetrics
from upperson_rt.printable import printable
from upperson_rt.towers import Tower

METRICS = RetrievalMetrics(r1=50.0, r5=60.0, r10=70.0, map=40.0, minp=30.0)


def compared(image: str = "f32", text: str = "f32") -> Compared:
    return Compared(
        metrics=METRICS,
        float_types={"image": image, "text": text},
        r1_drop=Drop(0.25, -0.5, 1.0),
        cosine={"min": 0.9, "1 %": 0.95, "median": 0.99},
        top10_overlap=88.0,
    )


def example_report() -> ExportReport:
    time = TowerTime(2.0, "bf16")
    nothing_kept: dict[Tower, list[LayerDamage]] = {"image": [], "text": []}
    return ExportReport(
        model="up-person-small",
        split=SplitSize(name="people, test", images=400, captions=800),
        max_r1_drop=0.5,
        variants={
            "fp32": VariantReport(
                rungs={"image": "fp32", "text": "fp32"},
                accuracy=Accuracy(metrics=METRICS, float_types={"image": "f32", "text": "f32"}),
                kept_float=nothing_kept,
                size_bytes=2**22,
                times={},
            ),
            "int8": VariantReport(
                rungs={"image": "mixed-1/8", "text": "fp32"},
                accuracy=compared(),
                elsewhere={"openvino": compared("bf16")},
                kept_float=nothing_kept | {"image": [LayerDamage("fc1", 1.5, 2.0, 3e-4)]},
                size_bytes=2**20,
                times={"openvino": {"image": time, "text": time}},
            ),
            "fp16": VariantReport(
                rungs={"image": "fp32", "text": "fp32"},
                accuracy=compared(),
                kept_float=nothing_kept,
                left_out="no tower keeps its accuracy in fp16",
                size_bytes=0,
                times={},
            ),
        },
        ladder=[
            Measured(
                variant="int8", tower="both", rung="plain + plain", backend="openvino",
                accepted=False, accuracy=compared("bf16", "bf16"),
            ),
            Measured(
                variant="fp16", tower="image", rung="fp16", backend=SIMULATED,
                accepted=False, accuracy=None, failure="it is not finite",
            ),
        ],
        conditions=Conditions(
            machine={"cpu": "a processor"}, threads=2, backends={"openvino": "2026.1"},
            batch={"image": 8, "text": 8}, caption_tokens=20, repeats=3,
        ),
        calibration=CalibrationRecord(
            samples=Samples(
                images=SampleHashes(source="people, train", sha256=("0" * 64,)),
                texts=SampleHashes(source="people, train", sha256=("1" * 64,)),
            ),
            estimator="mse",
            reused_file_sha256=None,
        ),
    )  # fmt: skip


def test_the_json_has_its_keys_in_their_order() -> None:
    content = example_report().as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert list(content) == [
        "model", "split", "max_r1_drop", "min_overlap", "variants", "ladder", "latency_conditions",
        "calibration",
    ]  # fmt: skip
    made = [
        "elsewhere",
        "rungs",
        "kept_float",
        "half_sums",
        "shipped",
        "reason",
        "size_bytes",
        "latency",
    ]
    measured = ["metrics", "r1_drop", "cosine", "top10_overlap", "float_types"]
    variants = content["variants"]
    assert list(variants["fp32"]) == ["metrics", "r1_drop", "float_types", *made]
    assert list(variants["int8"]) == [*measured, *made]
    assert list(variants["int8"]["elsewhere"]["openvino"]) == measured
    assert variants["fp32"]["r1_drop"] is None
    assert variants["int8"]["r1_drop"] == {"points": 0.25, "low": -0.5, "high": 1.0}
    assert variants["int8"]["latency"]["openvino"]["text"] == {
        "ms_per_item": 2.0,
        "float_type": "bf16",
    }
    assert (variants["fp16"]["shipped"], variants["fp16"]["reason"]) == (
        False,
        "no tower keeps its accuracy in fp16",
    )
    both, broken = content["ladder"]
    assert list(both) == list(broken) == [
        "variant", "tower", "rung", "backend", "float_types", "metrics", "r1_drop", "cosine",
        "top10_overlap", "accepted", "failure",
    ]  # fmt: skip
    assert (both["accepted"], both["failure"]) == (False, None)
    assert (broken["accepted"], broken["failure"]) == (False, "it is not finite")
    assert broken["float_types"] == {}
    assert [key for key, value in broken.items() if value is None] == [
        "metrics", "r1_drop", "cosine", "top10_overlap",
    ]  # fmt: skip
    assert list(content["calibration"]) == [
        "images", "image_source", "texts", "text_source", "sha256", "estimator",
        "reused_file_sha256",
    ]  # fmt: skip


def test_without_the_gate_nothing_is_measured() -> None:
    ungated = replace(example_report(), split=None, max_r1_drop=None, ladder=[], calibration=None)
    rows = {
        name: replace(row, accuracy=None, elsewhere={}) for name, row in ungated.variants.items()
    }
    content = replace(ungated, variants=rows).as_dict()
    assert (content["split"], content["max_r1_drop"], content["calibration"]) == (None, None, None)
    assert content["ladder"] == []
    row = content["variants"]["int8"]
    assert (row["metrics"], row["r1_drop"], row["float_types"], row["elsewhere"]) == (
        None, None, {}, {},
    )  # fmt: skip


def test_without_captions_rankings_are_what_is_told() -> None:
    report, manifest = named("crops")
    row = report.variants["int8"]
    row = replace(
        row,
        accuracy=replace(compared(), metrics=None, r1_drop=None),
        elsewhere={"openvino": replace(compared(), metrics=None, r1_drop=None, top10_overlap=97.5)},
    )
    report = replace(report, max_r1_drop=None, min_overlap=90.0, variants={"int8": row}, ladder=[])
    content = report.as_dict()
    assert (content["max_r1_drop"], content["min_overlap"]) == (None, 90.0)
    found = content["variants"]["int8"]
    assert (found["metrics"], found["r1_drop"], found["top10_overlap"]) == (None, None, 88.0)
    table = accuracy_table(report)
    assert [row[table.head.index("same top 10 %")] for row in table.body] == ["88.0", "97.5"]
    assert not [name for name in table.head if "R@1" in name]
    assert report.too_few_queries() is None
    page = " ".join(model_card(report, manifest).split())
    assert "How well it finds people was not measured: nobody said who is on" in page
    assert "800 sentences that the exporter brings, each querying 400 images of" in page
    assert "keeps at least 90.0 % of fp32's first ten pictures" in page
    assert "upperson evaluate BUNDLE" in page
    assert "loses at most" not in page
    assert "UP-Person dual encoder" in page
    base = replace(manifest.model, adapter_sha256=NO_ADAPTER)
    fingerprint = space_fingerprint(base, manifest.image, manifest.text)
    card = model_card(report, replace(manifest, model=base, fingerprint=fingerprint))
    assert "UP-Person" not in card
    assert "adapter: none: the base as it was published" in card


def test_what_floats_were_computed_in_stands_beside_every_measurement() -> None:
    table = accuracy_table(example_report())
    head, (_, *rows) = table.head, table.body
    assert [row[1] for row in rows] == [
        "onnxruntime, f32",
        "openvino, bf16 + f32",
        "onnxruntime, float16 simulated",
    ]
    assert {len(row) for row in rows} == {len(head)}
    assert [row[head.index("ms/caption")] for row in rows] == ["-", "2.0", "-"]
    assert rows[0][head.index("R@1 change (95 %)")] == "-0.25 (-1.00 to +0.50)"
    assert [row[-1] for row in rows] == ["yes", "yes", "no"]
    assert ladder_table(example_report()).body[0][3] == "openvino, bf16"


def test_a_form_that_does_not_work_says_why() -> None:
    table = ladder_table(example_report())
    assert table.body[1][-1] == "no: it is not finite"
    assert {len(row) for row in table.body} == {len(table.head)}


def test_sums_in_float16_are_told_in_words_and_numbers() -> None:
    report, manifest = named("people")
    fits = HalfSums(cosine=0.9999997, min_cosine=0.9995)
    casts = HalfSums(cosine=0.99961, min_cosine=0.9995, float_sums=("fc1", "fc2"))
    row = replace(report.variants["fp16"], left_out=None, half_sums={"image": casts, "text": fits})
    report = replace(report, variants={"fp16": row})
    assert report.as_dict()["variants"]["fp16"]["half_sums"]["image"] == {
        "cosine": 0.99961, "min_cosine": 0.9995, "float_sums": ("fc1", "fc2"),
    }  # fmt: skip
    page = " ".join(model_card(report, manifest).split())
    assert "image tower a cosine of 0.999610 to sums in float32 in the worst case" in page
    assert "optimistic; `upperson evaluate BUNDLE --root DIR --split val` measures it" in page
    assert "(needs 0.999500); 2 products got casts to float32." in page
    assert "text tower a cosine of 1.000000 to sums in float32 in the worst case" in page


def test_linears_left_in_float_come_with_their_damage() -> None:
    assert float_linear_table(example_report()).body == [
        ["int8", "image", "fc1", "1.50", "2.00", "3.0e-04"]
    ]


def test_a_gate_finer_than_one_query_is_told() -> None:
    def told(captions: int, allowed: float) -> str | None:
        split = SplitSize(name="people", images=1, captions=captions)
        return replace(example_report(), split=split, max_r1_drop=allowed).too_few_queries()

    assert told(200, 0.5) is None
    assert told(199, 0.5) == (
        "one of the 199 queries is 0.50 points of R@1, more than the 0.5 allowed: forms pass or "
        "fail by chance; measure on more queries"
    )
    assert told(1000, 0.0) is not None
    assert replace(example_report(), split=None, max_r1_drop=None).too_few_queries() is None


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</td></table><script>alert(1)</script>",
    "`code` [here](http://example.com) ![](x.png)",
    "people\n# A heading\n\n<b>bold</b> | cell",
    "`` ` ```\n---\n- item",
    "\x1b]0;owned\x07\u202egpj.egami \x9b2J",
    "&lt;b&gt; &amp; \"quoted\" 'names' {{ 7 * 7 }} {% raw %}",
]


def named(name: str) -> tuple[ExportReport, Manifest]:
    """A report and a manifest in which all that comes from outside has a name."""
    report = example_report()
    assert report.split is not None
    assert report.calibration is not None
    hashes = report.calibration.samples.images
    samples = Samples(images=replace(hashes, source=name), texts=replace(hashes, source=name))
    report = replace(
        report,
        model=name,
        split=replace(report.split, name=name),
        calibration=replace(report.calibration, samples=samples),
        conditions=replace(report.conditions, machine={"cpu": name}),
    )
    digest = "0" * 64
    tokenizer, canaries, image_file, text_file = (
        FileEntry(file=file, sha256=digest, size_bytes=1) for file in "abcd"
    )
    model = ModelSection(
        name=name, base=name, base_sha256=digest, adapter_sha256=digest, embed_dim=4
    )
    image = ImageSection(height_px=8, width_px=4, resize="bilinear-antialias")
    text = TextSection(context_length=7, tokenizer=tokenizer)
    variant = VariantEntry(
        precision="fp32", image=image_file, text=text_file, canary_min_cosine=0.9
    )
    manifest = Manifest(
        created="2026-01-01",
        generator="upperson",
        model=model,
        image=image,
        text=text,
        variants={"fp32": variant},
        default_variant="fp32",
        canaries=canaries,
        fingerprint=space_fingerprint(model, image, text),
    )
    return report, manifest


class Page(HTMLParser):
    """Tags and text as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {name for name, _ in attrs} & {"src", "href", "onerror", "onclick", "style"}
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def markdown_tokens(text: str) -> list[Token]:
    """What a Markdown renderer makes of a card, without its YAML header."""
    _, _, body = text.removeprefix("---\n").partition("\n---\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return [inner for token in tokens for inner in (token, *(token.children or []))]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_page_prints_a_hostile_name_and_nothing_of_it_works(name: str) -> None:
    page, plain = Page(report_html(*named(name))), Page(report_html(*named("people")))
    assert page.tags == plain.tags
    assert "".join(page.text).count(printable(name)) == "".join(plain.text).count("people") >= 6


@pytest.mark.parametrize("name", HOSTILE)
def test_the_card_prints_a_hostile_name_and_nothing_of_it_works(name: str) -> None:
    card, plain = model_card(*named(name)), model_card(*named("people"))
    tokens, expected = markdown_tokens(card), markdown_tokens(plain)
    assert [token.type for token in tokens] == [token.type for token in expected]
    shown = [token.content for token in tokens if token.type == "code_inline"]
    assert shown.count(printable(name)) >= 6
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == name


def test_the_page_needs_nothing_from_elsewhere() -> None:
    html = report_html(*named("people"))
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert "prefers-color-scheme: dark" in html
