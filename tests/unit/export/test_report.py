"""``report.json``, the tables, the page and the model card."""

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt

from tests.helpers.toy_bundle import make_toy_bundle
from upperson_calibration.calibration_file import SampleHashes, Samples
from upperson_calibration.sensitivity import LayerSensitivity
from upperson_export.pages import (
    accuracy_table,
    candidate_table,
    change_table,
    float_linear_table,
    model_card,
    report_html,
)
from upperson_export.precision_search import MEASURES, Accuracy, Compared, Drop, Measured
from upperson_export.report import (
    CalibrationRecord,
    Conditions,
    ExportReport,
    SplitSize,
    TowerTime,
    VariantReport,
)
from upperson_export.variants import SIMULATED
from upperson_rt.bundle import read_manifest
from upperson_rt.manifest import NO_ADAPTER, space_fingerprint
from upperson_rt.printable import escape_for_display
from upperson_scores.metrics import RetrievalMetrics

METRICS = RetrievalMetrics(r1=50.0, r5=60.0, r10=70.0, map=40.0, minp=30.0)


def compared(image="f32", text="f32", **changes):
    found = Compared(
        metrics=METRICS,
        float_types={"image": image, "text": text},
        short=replace(METRICS, r1=80.0),
        drops=dict.fromkeys(MEASURES, Drop(0.25, -0.5, 1.0)),
        cosine={"min": 0.9, "1 %": 0.95, "median": 0.99},
        top10_overlap=88.0,
    )
    return replace(found, **changes)


def variant(image, text, **fields):
    given = {
        "kept_float": {"image": [], "text": []}, "accuracy": compared(), "size_bytes": 2**20,
        "times": {},
    }  # fmt: skip
    return VariantReport(candidates={"image": image, "text": text}, **given | fields)


def example_report():
    time = TowerTime(2.0, "bf16")
    exact = Accuracy(metrics=METRICS, float_types={"image": "f32", "text": "f32"})
    hashes = SampleHashes(source="people, train", sha256=("0" * 64,))
    return ExportReport(
        model="up-person-small",
        split=SplitSize(
            name="people, test", images=400, captions=800, people=100, short_queries=50
        ),
        max_r1_drop=0.5,
        variants={
            "fp32": variant("fp32", "fp32", accuracy=exact, size_bytes=2**22),
            "int8": variant(
                "mixed-1/8", "fp32", elsewhere={"openvino": compared("bf16")},
                kept_float={"image": [LayerSensitivity("fc1", 1.5, 2.0, 3e-4)], "text": []},
                times={"openvino": {"image": time, "text": time}},
            ),
            "fp16": variant(
                "fp32", "fp32", size_bytes=0, left_out="no tower keeps its accuracy in fp16"
            ),
        },
        measured=[
            Measured(
                variant="int8", tower="both", candidate="plain + plain", backend="openvino",
                accepted=False, accuracy=compared("bf16", "bf16"),
            ),
            Measured(
                variant="fp16", tower="image", candidate="fp16", backend=SIMULATED,
                accepted=False, accuracy=None, failure="does not work: it is not finite",
            ),
        ],
        conditions=Conditions(
            machine={"cpu": "a processor"}, threads=2, backends={"openvino": "2026.1"},
            batch={"image": 8, "text": 8}, caption_tokens=20, repeats=3,
        ),
        calibration=CalibrationRecord(
            samples=Samples(images=hashes, texts=hashes), estimator="mse", reused_file_sha256=None
        ),
    )  # fmt: skip


def test_the_json_has_its_keys_in_their_order():
    content = example_report().as_dict()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    variants = content["variants"]
    both, broken = content["ladder"]
    made = "elsewhere rungs kept_float half_sums shipped reason size_bytes latency"
    measured = "metrics short r1_drop drops cosine top10_overlap float_types"
    row = "variant tower rung backend float_types metrics short r1_drop drops cosine top10_overlap"
    samples = "images image_source texts text_source sha256"
    whole = "model split max_r1_drop min_overlap bootstrap variants ladder latency_conditions"
    for found, keys in (
        (content, f"{whole} calibration scores"),
        (variants["fp32"], f"metrics short r1_drop float_types {made}"),
        (variants["int8"], f"{measured} {made}"),
        (variants["int8"]["elsewhere"]["openvino"], measured),
        (both, f"{row} accepted failure"),
        (broken, f"{row} accepted failure"),
        (content["calibration"], f"{samples} estimator reused_file_sha256"),
    ):
        assert list(found) == keys.split()
    assert variants["int8"]["r1_drop"] == {"points": 0.25, "low": -0.5, "high": 1.0}
    assert variants["int8"]["drops"]["short mAP"] == variants["int8"]["r1_drop"]
    assert (variants["int8"]["short"]["R@1"], variants["fp32"]["short"]) == (80.0, None)
    assert content["bootstrap"]["captions"] == "by person"
    assert (content["split"]["people"], content["split"]["short_queries"]) == (100, 50)
    times = variants["int8"]["latency"]["openvino"]
    assert times["text"] == {"ms_per_item": 2.0, "float_type": "bf16"}
    assert (variants["fp16"]["shipped"], bool(variants["fp16"]["reason"])) == (False, True)
    assert (both["accepted"], both["failure"]) == (False, None)
    empty = {key: value for key, value in broken.items() if not value}
    unmeasured = dict.fromkeys(["metrics", "short", "r1_drop", "drops", "cosine", "top10_overlap"])
    assert empty == unmeasured | {"float_types": {}, "accepted": False}
    assert "it is not finite" in broken["failure"]


def test_without_captions_rankings_are_reported():
    unknown = {"metrics": None, "short": None, "drops": {}}
    row = variant(
        "plain", "plain", accuracy=compared(**unknown),
        elsewhere={"openvino": compared(top10_overlap=97.5, **unknown)},
    )  # fmt: skip
    split = SplitSize(name="crops", images=400, captions=800)
    report = replace(
        example_report(), split=split, max_r1_drop=None, min_overlap=90.0, variants={"int8": row}
    )
    found = report.as_dict()["variants"]["int8"]
    assert (found["metrics"], found["r1_drop"], found["top10_overlap"]) == (None, None, 88.0)
    table = accuracy_table(report)
    assert [row[table.head.index("top-10 overlap %")] for row in table.body] == ["88.0", "97.5"]
    assert not [name for name in table.head if "R@1" in name]
    assert not change_table(report).body
    assert report.as_dict()["bootstrap"] is None
    assert report.too_few_queries() is None


def test_the_tables_have_float_types_changes_and_failures():
    table = accuracy_table(example_report())
    head, (_, *rows) = table.head, table.body
    assert [row[1] for row in rows] == [
        "onnxruntime, f32", "openvino, bf16 + f32", "onnxruntime, float16 simulated",
    ]  # fmt: skip
    assert [row[head.index("ms/caption")] for row in rows] == ["-", "2.0", "-"]
    assert [row[-1] for row in rows] == ["yes", "yes", "no"]
    changes = change_table(example_report())
    assert changes.body[0][2:] == ["-0.25 (-1.00 to +0.50)"] * len(MEASURES)
    candidates = candidate_table(example_report())
    assert candidates.body[1][-1] == "no: does not work: it is not finite"
    for one in (table, changes, candidates):
        assert {len(row) for row in one.body} == {len(one.head)}
    assert float_linear_table(example_report()).body == [
        ["int8", "image", "fc1", "1.50", "2.00", "3.0e-04"]
    ]


@pytest.mark.parametrize(
    ("captions", "allowed", "warns"), [(200, 0.5, False), (199, 0.5, True), (1000, 0.0, True)]
)
def test_a_gate_finer_than_one_query_is_reported(captions, allowed, warns):
    split = SplitSize(name="people", images=1, captions=captions)
    warning = replace(example_report(), split=split, max_r1_drop=allowed).too_few_queries()
    assert (warning is not None) == warns
    assert not warns or f"{100 / captions:.2f} points" in warning
    assert replace(example_report(), split=None, max_r1_drop=None).too_few_queries() is None


def test_pages_say_what_intervals_resample_and_whether_short_queries_were_measured(manifest):
    report = example_report()
    unknown = replace(report, split=replace(report.split, short_queries=0))
    for page in (model_card, report_html):
        text = page(report, manifest)
        for part in ("100 people", "50 short queries", "short R@1 change"):
            assert part in text
        assert "were not measured" not in text
        assert "100 people" in page(unknown, manifest)
        assert "were not measured" in page(unknown, manifest)


# --- Names from outside

HOSTILE = [
    "</td></table><script>alert(1)</script>",
    "`code` [here](http://example.com) ![](x.png)",
    "people\n# A heading\n\n<b>bold</b> | cell",
    "\x1b]0;owned\x07\u202egpj.egami \x9b2J",
    "&lt;b&gt; &amp; \"quoted\" 'names' {{ 7 * 7 }} {% raw %}",
]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return read_manifest(make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle"))


def named(manifest, name, **changes):
    """A report and a manifest in which everything from outside has a name."""
    report = example_report()
    hashes = replace(report.calibration.samples.images, source=name)
    report = replace(
        report,
        model=name,
        split=replace(report.split, name=name),
        calibration=replace(report.calibration, samples=Samples(images=hashes, texts=hashes)),
        conditions=replace(report.conditions, machine={"cpu": name}),
    )
    model = replace(manifest.model, name=name, base=name, **changes)
    fingerprint = space_fingerprint(model, manifest.image, manifest.text)
    return report, replace(manifest, model=model, fingerprint=fingerprint)


class Page(HTMLParser):
    """Tags and text as a browser sees them."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        assert not {name for name, _ in attrs} & {"src", "href", "onerror", "onclick", "style"}
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def markdown_tokens(text):
    """What a Markdown renderer makes of a card, without its YAML header."""
    _, _, body = text.removeprefix("---\n").partition("\n---\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(body)
    return [inner for token in tokens for inner in (token, *(token.children or []))]


@pytest.mark.parametrize("name", HOSTILE)
def test_page_and_card_print_a_hostile_name_and_it_does_nothing(manifest, name):
    hostile, usual = named(manifest, name), named(manifest, "usual")
    page, plain = Page(report_html(*hostile)), Page(report_html(*usual))
    assert page.tags == plain.tags
    assert (
        "".join(page.text).count(escape_for_display(name))
        == "".join(plain.text).count("usual")
        >= 6
    )
    card = model_card(*hostile)
    tokens, expected = markdown_tokens(card), markdown_tokens(model_card(*usual))
    assert [token.type for token in tokens] == [token.type for token in expected]
    assert "UP-Person" in card
    assert "UP-Person" not in model_card(*named(manifest, name, adapter_sha256=NO_ADAPTER))
    shown = [token.content for token in tokens if token.type == "code_inline"]
    assert shown.count(escape_for_display(name)) >= 6
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == name
