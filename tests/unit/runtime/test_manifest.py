import dataclasses
import json

import pytest

from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import check_relative_path, parse_manifest, space_fingerprint


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
        ("model.embed_dim", "512", r"model\.embed_dim: expected an integer.*found '512'"),
        ("model.embed_dim", True, r"model\.embed_dim: expected an integer.*found True"),
        ("image.height_px", 0, r"image\.height_px: expected an integer of at least 1"),
        ("image.resize", "nearest", r"image\.resize: expected 'bilinear-antialias'"),
        ("text", [], r"bundle\.json: text: expected an object, found \[\]"),
        ("variants", {}, "expected at least one variant"),
        ("default_variant", "int9", "no such variant, did you mean 'int8'"),
        ("variants.int8.canary_min_cosine", 2, "expected 0 to 1, found 2"),
        ("variants.int8.metrics", {"R@1": "x"}, r"metrics\.R@1: expected a number"),
        ("variants.int8.image.sha256", "abc", r"int8\.image\.sha256: expected 64"),
        ("canaries.size_bytes", -1, r"canaries\.size_bytes: expected an integer of at least 0"),
        ("generator", "", "generator: expected a non-empty string"),
        ("schema_version", 2, r"version 2, this program reads up to 1: update it"),
        ("schema_version", 0, r"schema_version: expected an integer of at least 1"),
    ],
)
def test_malformed_manifests_are_refused(content, path, value, message):
    change(content, path, value)
    with pytest.raises(InputError, match=message):
        parse_manifest(content)


def test_a_newer_schema_is_told_before_its_unknown_keys(content):
    content.update(schema_version=2, brand_new=1)
    with pytest.raises(InputError, match="update it"):
        parse_manifest(content)


def test_cut_off_json_is_refused(text):
    with pytest.raises(InputError, match="not valid JSON"):
        parse_manifest(text[:200])


@pytest.mark.parametrize("null", ["variants.int8.metrics", "variants.int8.calibration", "report"])
def test_optional_parts_may_be_null(content, null):
    change(content, null, None)
    parse_manifest(content)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", "C:/x", ".", "a\0b"]
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
