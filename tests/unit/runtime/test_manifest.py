import dataclasses
import json

import pytest

from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import (
    check_relative_path,
    parse_manifest,
    share_a_space,
    space_fingerprint,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    bundle = make_toy_bundle(tmp_path_factory.mktemp("manifest") / "bundle")
    return (bundle / "bundle.json").read_text(encoding="utf-8")


@pytest.fixture
def content(text):
    return json.loads(text)


def test_round_trip(text, content):
    manifest = parse_manifest(text)
    assert manifest.to_json() == text
    assert parse_manifest(content) == manifest
    assert next(iter(content)) == "schema_version"
    assert manifest.variants["int8"].calibration == {"images": 512}
    assert manifest.variants["fp32"].metrics == {"R@1": 73.5, "mAP": 66.0}


def change(content, path, value):
    *parents, last = path.split(".")
    for name in parents:
        content = content[name]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("default_variants", 1, r"bundle\.json: unknown key .*, did you mean 'default_variant'"),
        ("model.embed_dims", 1, r"bundle\.json: model: unknown key .* 'embed_dim'"),
        ("variants.int8.canary_cos", 1, r"variants\.int8: unknown key 'canary_cos'"),
        ("model.embed_dim", KeyError, r"bundle\.json: model\.embed_dim: missing"),
        ("model.embed_dim", "512", r"model\.embed_dim: expected a whole number.*found '512'"),
        ("model.embed_dim", True, r"model\.embed_dim: expected a whole number.*found True"),
        ("image.height_px", 0, r"image\.height_px: expected a whole number, 1 to 4096, found 0"),
        ("image.width_px", 10**9, r"image\.width_px: expected a whole number, 1 to 4096"),
        ("model.distilled_from", "sha256:abc", r"model\.distilled_from: expected sha256: and 64"),
        ("model.embed_dim", 0, r"model\.embed_dim: expected a whole number, 1 to 65536"),
        ("model.embed_dim", 10**18, r"model\.embed_dim: expected a whole number, 1 to 65536"),
        ("text.context_length", 10**9, r"text\.context_length: expected a whole number, 3 to"),
        ("image.resize", "nearest", r"image\.resize: expected 'bilinear-antialias'"),
        ("text", [], r"bundle\.json: text: expected an object, found \[\]"),
        ("variants", {}, "expected at least one variant"),
        ("default_variant", "int9", "no such variant, did you mean 'int8'"),
        ("variants.int8.canary_min_cosine", 2, r"expected 0\.9 to 1, found 2"),
        ("variants.int8.canary_min_cosine", 1e-9, r"expected 0\.9 to 1, found 1e-09"),
        ("variants.int8.metrics", {"R@1": 1e308}, r"metrics\.R@1: expected percent, 0 to 100"),
        ("variants.int8.metrics", {"R@1": 10**400}, r"metrics\.R@1: expected a finite number"),
        ("variants.int8.precision", "fp32", r"variants\.int8: expected the precision 'int8'"),
        (
            "variants.int8.metrics",
            {"R@1": "x"},
            r"metrics\.R@1: expected percent, 0 to 100, found 'x'",
        ),
        ("variants.int8.image.sha256", "abc", r"int8\.image\.sha256: expected 64"),
        ("canaries.size_bytes", -1, r"canaries\.size_bytes: expected an integer of at least 0"),
        ("generator", "", "generator: expected a non-empty string"),
        ("schema_version", 0, r"schema_version: expected an integer of at least 1"),
    ],
)
def test_malformed_manifests_are_refused(content, path, value, message):
    change(content, path, value)
    with pytest.raises(IntegrityError, match=message):
        parse_manifest(content)


def test_a_variant_is_not_another_ones_files(content):
    fp32, int8 = (content["variants"][name] for name in ("fp32", "int8"))
    int8["text"] = fp32["text"]  # A tower that did not keep its accuracy.
    parse_manifest(content)
    int8["image"] = fp32["image"]
    with pytest.raises(IntegrityError, match=r"variants\.int8: its files are those of fp32"):
        parse_manifest(content)


def test_a_file_has_one_role_and_one_hash(content):
    int8 = content["variants"]["int8"]
    int8["text"] = int8["image"]
    with pytest.raises(IntegrityError, match="named as image tower and again as text tower"):
        parse_manifest(content)
    int8["text"] = content["variants"]["fp32"]["text"] | {"size_bytes": 1}
    with pytest.raises(IntegrityError, match="or with another hash"):
        parse_manifest(content)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"created"', '"generator": "x", "created"', "the key 'generator' is there twice"),
        ("0.9999", "NaN", "not valid JSON: NaN is not a number"),
        ("0.9999", "1e999", "expected a finite number"),
        ('{"images": 512}', "[" * 100_000, "not valid JSON"),
        ('"canaries": {', '"canaries": ' + "[" * 900 + "]" * 900 + ', "c": {', "unknown key 'c'"),
        ('"default_variant": "int8"', '"default_variant": ' + "[" * 900 + "]" * 900, "found "),
    ],
)
def test_json_that_readers_take_differently_or_fail_on_is_refused(content, old, new, message):
    changed = json.dumps(content).replace(old, new, 1)
    assert changed != json.dumps(content)
    with pytest.raises(IntegrityError, match=message):
        parse_manifest(changed)


def test_a_newer_schema_is_told_before_its_unknown_keys(content):
    content.update(schema_version=2, brand_new=1)
    with pytest.raises(InputError, match="update it"):
        parse_manifest(content)


def test_cut_off_json_is_refused(text):
    with pytest.raises(IntegrityError, match="not valid JSON"):
        parse_manifest(text[:200])


@pytest.mark.parametrize("null", ["variants.int8.metrics", "variants.int8.calibration", "report"])
def test_optional_parts_may_be_null(content, null):
    change(content, null, None)
    parse_manifest(content)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "C:/x", ".", "a\0b", "./x", "a//b", "a/"],
)
def test_paths_may_not_leave_the_bundle(content, name):
    with pytest.raises(IntegrityError, match="leaves the bundle"):
        check_relative_path(name)
    change(content, "variants.fp32.text.file", name)
    with pytest.raises(IntegrityError, match=r"variants\.fp32\.text: the path .* leaves"):
        parse_manifest(content)


def test_paths_inside_are_fine():
    assert check_relative_path("a/b..c.onnx") == "a/b..c.onnx"


def test_an_edited_identity_is_noticed(content):
    change(content, "model.adapter_sha256", "other")
    with pytest.raises(IntegrityError, match=r"fingerprint is sha256:.* give sha256:"):
        parse_manifest(content)


def test_fingerprint_covers_the_space_and_nothing_else(text):
    manifest = parse_manifest(text)
    model, image, tokens = manifest.model, manifest.image, manifest.text
    same = space_fingerprint(dataclasses.replace(model, name="renamed"), image, tokens)
    assert same == manifest.fingerprint
    for other in (
        space_fingerprint(dataclasses.replace(model, embed_dim=8), image, tokens),
        space_fingerprint(dataclasses.replace(model, base_sha256="x"), image, tokens),
        space_fingerprint(model, dataclasses.replace(image, width_px=9), tokens),
        space_fingerprint(model, image, dataclasses.replace(tokens, context_length=5)),
    ):
        assert other != manifest.fingerprint


def test_a_students_fingerprint_names_its_teacher(text):
    manifest = parse_manifest(text)
    teacher, model = manifest.fingerprint, manifest.model
    students = [
        space_fingerprint(
            dataclasses.replace(model, adapter_sha256=sha, distilled_from=teacher),
            manifest.image,
            manifest.text,
        )
        for sha in ("5" * 64, "6" * 64)
    ]
    assert len({teacher, *students}) == 3
    assert all(student.endswith(f"/{teacher}") for student in students)
    assert share_a_space(students[0], teacher)
    assert share_a_space(teacher, students[1])
    assert share_a_space(*students)
    assert not share_a_space(students[0], "sha256:other")
    assert not share_a_space("sha256:one", "sha256:other")
