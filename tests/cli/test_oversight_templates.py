"""`upperson-rt oversight templates`: outlines filled in from the configuration of a site."""

import json
import re
import shutil

import numpy as np
import pytest

from tests.helpers.invoke import refusal, run_rt
from tests.helpers.toy_bundle import calibrate_toy_bundle, make_toy_bundle
from upperson_console.accounts import add_token
from upperson_rt.bundle import read_manifest
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.clips import clip_name, clips_dir

NAMES = ["dpia.md", "record-of-processing.md", "sign.md"]
ODD = "hall | <b>*2*</b>\n# x"
OVERSIGHT = """
purposes: ["Theft, reported", "Missing person"]
case_number: required
two_persons: [export, delete]
approvals_expire_hours: 12
refused_sentences: {built_in: true, extra: ["tattoo*", "x"]}
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A bundle with a calibration, a gallery with clips, accounts, and an oversight file."""
    folder = tmp_path_factory.mktemp("site")
    bundle = make_toy_bundle(folder / "bundle")
    calibrate_toy_bundle(bundle)
    manifest = read_manifest(bundle)
    with Gallery.open(
        folder / "gallery", manifest.fingerprint, manifest.model.embed_dim, create=True
    ) as gallery:
        items = [
            Item(key=str(n), camera=camera, time=1_790_000_000.0 + n)
            for n, camera in enumerate(("gate", "gate", ODD))
        ]
        gallery.add(items, np.eye(3, manifest.model.embed_dim, dtype=np.float32))
        clips = clips_dir(gallery.crops_dir) / "gate/2026-11-30"
    clips.mkdir(parents=True)
    (clips / clip_name("crop.jpg", ".mp4", 1.0, 2.0)).write_bytes(b"clip")
    add_token(folder / "tokens.json", "vera", "viewer", ("gate",))
    add_token(folder / "tokens.json", "olga", "operator", None, 3600)
    add_token(folder / "tokens.json", "ada", "admin", None)
    (folder / "oversight.yaml").write_text(OVERSIGHT)
    return folder


def command(site, folder, *more):
    return ("oversight", "templates", "--oversight", site / "oversight.yaml", "-o", folder, *more)


def whole(site, folder, *more):
    return command(site, folder, "-g", site / "gallery", "-b", site / "bundle", "--token-file",
                   site / "tokens.json", "--keep", "30d", "--keep", "gate=7d", "--blur",
                   *more)  # fmt: skip


@pytest.mark.parametrize("language", ["en", "de"])
def test_the_outlines_hold_the_configuration_and_blanks(site, tmp_path, language):
    done = run_rt(*whole(site, tmp_path / "out", "--language", language, "--json"))
    result = json.loads(done.stdout)
    assert result["files"] == [str(tmp_path / "out" / name) for name in NAMES]
    texts = {name: (tmp_path / "out" / name).read_text("utf-8") for name in NAMES}
    manifest = read_manifest(site / "bundle")
    variant = manifest.variants[manifest.default_variant]
    in_both = ["Theft, reported", "Missing person", "30d; gate=7d", manifest.model.name,
               manifest.fingerprint[:19], "| gate | 2 | 2026-09-2",
               r"| hall \| \<b\>\*2\*\</b\>\\n\# x | 1 | 2026-09-2"]  # fmt: skip
    in_both += ["12 hours", "1 viewers", "1 operators", "1 administrators", "export, delete",
                "whole frames and clips", "2 further"] if language == "en" else []  # fmt: skip
    in_both += [str(round(value, 1)).replace(".", "," if language == "de" else ".")
                for value in (variant.metrics or {}).values()]  # fmt: skip
    for name in NAMES[:2]:
        for part in in_both:
            assert part in texts[name], (name, part)
    blank = {"en": "**[to fill in: ", "de": "**[auszufüllen: "}[language]
    for name, text in texts.items():
        assert text.count(blank) >= 4, name
        assert {"en": "no legal advice", "de": "keine Rechtsberatung"}[language] in text, name
        assert not re.search(r"\{[%{]|None|Undefined", text), name
        assert text.endswith("\n")
    pixelated = {"en": "are pixelated", "de": "verpixelt"}[language]
    assert pixelated in texts["dpia.md"]


def test_without_a_gallery_and_the_rest_there_are_more_blanks(site, tmp_path):
    assert run_rt(*command(site, tmp_path / "bare")).exit_code == 0
    bare = (tmp_path / "bare/dpia.md").read_text("utf-8")
    for part in ("[to fill in: cameras", "[to fill in: accounts", "[to fill in: model", "no rule"):
        assert part in bare


def test_the_bin_and_a_time_stamp_authority_are_named(site, tmp_path):
    def texts(name, *more):
        folder = tmp_path / name
        assert run_rt(*command(site, folder, *more)).exit_code == 0
        return [(folder / one).read_text("utf-8") for one in NAMES]

    for name, more, has_blank in (
        ("bare", (), True), ("days", ("--bin", "12h"), False), ("none", ("--bin", "0"), False),
    ):  # fmt: skip
        for text in texts(name, *more)[:2]:
            (line,) = [one for one in text.splitlines() if one.startswith("- Deleted pictures: ")]
            assert ("**[to fill in: " in line, "12h" in line) == (has_blank, name == "days"), line
    assert "**[to fill in: time-stamp authority" in texts("recipients")[1]


def test_no_file_is_replaced_and_a_refusal_writes_nothing(site, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "sign.md").write_text("mine")
    refusal(run_rt(*command(site, folder, "--json")), 3, "file_exists")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"sign.md": "mine"}
    other = tmp_path / "other"
    for more, code in (
        (("--language", "xx"), "language_unknown"),
        (("--keep", "long"), "age_malformed"),
        (("--keep", "30d", "--keep", "7d"), "age_given_twice"),
        (("--bin", "week"), "age_malformed"),
    ):
        refusal(run_rt(*command(site, other, *more, "--json")), 2, code)
    broken = tmp_path / "broken"
    shutil.copytree(site / "bundle", broken)
    (broken / "bundle.json").write_text("{}")
    assert run_rt(*command(site, other, "-b", broken)).exit_code == 6
    assert run_rt(*command(site, other, "-g", tmp_path / "nothing")).exit_code == 3
    assert run_rt(*command(site, other, "--token-file", site / "oversight.yaml")).exit_code == 3
    assert not other.exists()
    (site / "bad.yaml").write_text("purposes: 3")
    bad = ("oversight", "templates", "--oversight", site / "bad.yaml", "-o", other)
    assert run_rt(*bad).exit_code == 3
    assert not other.exists()
