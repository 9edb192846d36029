import dataclasses
import json

import pytest

from tests.helpers.refused import refused
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.manifest import (
    check_relative_path,
    parse_manifest,
    share_a_space,
    space_fingerprint,
)


@pytest.fixture
def text(toy_bundle):
    return (toy_bundle / "bundle.json").read_text(encoding="utf-8")


@pytest.fixture
def content(text):
    return json.loads(text)


def change(content, path, value):
    *parents, last = path.split(".")
    for name in parents:
        content = content[name]
    if value is KeyError:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "code", "at"),
    [
        ("default_variants", 1, "key_unknown", ""),
        ("model.embed_dim", KeyError, "key_missing", "model.embed_dim"),
        ("image.width_px", 10**9, "value_unfit", "image.width_px"),
        ("model.distilled_from", "sha256:abc", "value_unfit", "model.distilled_from"),
        ("model.embed_dim", 10**18, "value_unfit", "model.embed_dim"),
        ("text.context_length", 10**9, "value_unfit", "text.context_length"),
        ("image.resize", "nearest", "value_unfit", "image.resize"),
        ("variants", {}, "no_variant", ""),
        ("default_variant", "int9", "variant_unknown", ""),
        ("variants.int8.canary_min_cosine", 1e-9, "value_unfit", "variants.int8.canary_min_cosine"),
        ("variants.int8.metrics", {"R@1": 1e308}, "value_unfit", "variants.int8.metrics.R@1"),
        ("variants.int8.precision", "fp32", "precision_differs", ""),
        ("model.adapter_sha256", "other", "fingerprint_differs", ""),
    ],
)
def test_malformed_manifests_are_refused(content, path, value, code, at):
    change(content, path, value)
    with refused(code, IntegrityError, at=at):
        parse_manifest(content)


def test_a_file_has_one_role_and_one_hash_and_a_variant_its_own_files(content):
    fp32, int8 = (content["variants"][name] for name in ("fp32", "int8"))
    own, int8["text"] = dict(int8), fp32["text"]  # A tower that did not keep its accuracy.
    parse_manifest(content)
    int8["image"] = fp32["image"]
    with refused("variant_copied", IntegrityError, variant="int8"):
        parse_manifest(content)
    for text in (own["image"], fp32["text"] | {"size_bytes": 1}):
        int8.update(image=own["image"], text=text)
        with refused("file_reused", IntegrityError, path=text["file"]):
            parse_manifest(content)


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ('"created"', '"generator": "x", "created"', "no_json"),
        ('"canaries": {', '"canaries": ' + "[" * 900 + "]" * 900 + ', "c": {', "key_unknown"),
        ('"default_variant": "int8"', '"default_variant": ' + "[" * 900 + "]" * 900, "value_unfit"),
    ],
)
def test_json_that_readers_take_differently_or_fail_on_is_refused(content, old, new, code):
    changed = json.dumps(content).replace(old, new, 1)
    assert changed != json.dumps(content)
    with refused(code, IntegrityError):
        parse_manifest(changed)


def test_manifests_are_read_as_written_and_a_newer_schema_comes_before_its_unknown_keys(
    text, content
):
    manifest = parse_manifest(text)
    assert manifest.to_json() == text
    assert parse_manifest(content) == manifest
    assert next(iter(content)) == "schema_version"
    assert manifest.variants["int8"].calibration == {"images": 512}
    assert manifest.variants["fp32"].metrics == {"R@1": 73.5, "mAP": 66.0}
    for optional in ("variants.int8.metrics", "variants.int8.calibration", "report"):
        change(content, optional, None)
        parse_manifest(content)
    content.update(schema_version=3, brand_new=1)
    with refused("version_unknown", InputError):
        parse_manifest(content)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "a/../../x", "a\\b", "C:x", ".", "a\0b", "./x", "a//b", "a/"],
)
def test_paths_may_not_leave_the_bundle(content, name):
    with refused("path_outside", IntegrityError):
        check_relative_path(name)
    change(content, "variants.fp32.text.file", name)
    with refused("path_outside", IntegrityError, at="variants.fp32.text"):
        parse_manifest(content)


def test_fingerprint_covers_the_space_and_nothing_else(text):
    manifest = parse_manifest(text)
    sections = {"model": manifest.model, "image": manifest.image, "text": manifest.text}

    def fingerprint(section, **changes):
        changed = dataclasses.replace(sections[section], **changes)
        return space_fingerprint(**sections | {section: changed})

    own = manifest.fingerprint
    assert fingerprint("model", name="renamed") == own
    changed = [fingerprint("model", embed_dim=8), fingerprint("model", base_sha256="x")]
    changed += [fingerprint("image", width_px=9), fingerprint("text", context_length=5)]
    # A student's fingerprint names its teacher.
    one, other = (
        fingerprint("model", adapter_sha256=sha, distilled_from=own) for sha in ("5" * 64, "6" * 64)
    )
    assert len({own, one, other, *changed}) == 7
    assert one.endswith(f"/{own}")
    for pair in ((one, own), (own, other), (one, other)):
        assert share_a_space(*pair)
    for name in (one, "sha256:one"):
        assert not share_a_space(name, "sha256:other")
