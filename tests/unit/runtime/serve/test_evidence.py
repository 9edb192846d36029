"""An evidence package: what it says, its signature, and what its verification finds."""

import base64
import hashlib
import html
import json
import struct
import zipfile

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from tests.helpers.command_line import run_code
from tests.helpers.console import START, add_items, id_of, log_lines
from tests.helpers.invoke import refusal, run_rt
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bundle import draw_person
from tests.unit.runtime.test_signature import model_signing
from upperson_console.evidence_check import Package, Seal
from upperson_log.query_log import QueryLog
from upperson_rt.gallery import Item
from upperson_signature.signature import read_private_key, sign_files

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name in ("site", "other"):
        write_keys(folder, name, ec.generate_private_key(ec.SECP256R1()))
    return folder


@pytest.fixture
def sealed(calibrated, keys):
    """A console that signs its exports."""
    bundle = {"signed_by": "f" * 64, "verified": True}
    calibrated.service.seal = Seal(key=read_private_key(keys / "site.pem"), bundle=bundle)
    return calibrated


@pytest.fixture
def package(sealed, tmp_path):
    """A signed package of two pictures, one with its frame."""
    frame = draw_person(tmp_path / "frame.png", "red", size=(300, 200))
    box = (10, 20, 110, 180)
    (boxed,) = add_items(
        sealed, Item(key="boxed", camera="gate", time=START, box=box, source=str(frame))
    )
    ids = [str(id_of(sealed, "red-0")), str(boxed)]
    body = {"ids": ids, "search": {"sentence": "red coat", "by_track": False}}
    file = tmp_path / "package.zip"
    file.write_bytes(sealed.client.post("/api/v1/export", json=body).content)
    return file


def files_of(package):
    with zipfile.ZipFile(package) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_report_has_what_a_reader_needs(sealed, package):
    files = files_of(package)
    facts = json.loads(files["items.json"])
    encoder = sealed.service.encoder
    expected = {
        "user": "local", "role": "admin", "model": encoder.fingerprint, "variant": encoder.variant,
        "bundle_signed_by": "f" * 64, "bundle_verified": True, "sentence": "red coat",
    }  # fmt: skip
    assert facts.items() >= expected.items()
    found = sealed.client.search(sentence="red coat", by_track=False).json()
    assert facts["query"]["verdict"] == found["verdict"]
    likelihoods = {hit["id"]: hit["likelihood"] for hit in found["hits"]}
    for one in facts["items"]:
        assert one["hit"]["likelihood"] == likelihoods[one["id"]]
    saved, boxed = facts["items"]
    kept = (sealed.folder / "crops" / "red0.png").read_bytes()
    assert files[saved["file"]] == kept
    assert files[boxed["frame"]["file"]] == (package.parent / "frame.png").read_bytes()
    assert boxed["file"] != boxed["frame"]["file"]  # Only the person is the picture.
    page = html.unescape(files["index.html"].decode())
    for part in ("red coat", facts["query"]["verdict"]["text"], facts["exported"], "f" * 64,
                 f'src="{saved["file"]}"', f'<image href="{boxed["frame"]["file"]}"',
                 '<rect x="10" y="20" width="100" height="160"/>'):  # fmt: skip
        assert part in page


def test_a_signed_package_is_verified_and_is_in_the_log(sealed, package, keys):
    report = Package(package, keys / "site.pub")
    assert (report.problems, report.signature, report.facts["pictures"]) == ([], "trusted", 2)
    first = log_lines(sealed)[-2]["chain"] if len(log_lines(sealed)) > 1 else ""
    assert report.facts["log_chain"] == first
    number = report.find_in(sealed.log)
    assert (report.problems, number) == ([], len(log_lines(sealed)))
    sealed.client.search(sentence="red")
    assert (report.find_in(sealed.log), report.problems) == (number, [])
    named = Package(package)
    assert (named.problems, named.signature) == ([], "not_checked")
    assert named.signed_by == report.signed_by
    other = Package(package, keys / "other.pub")
    assert ([one.code for one in other.problems], other.facts) == (["signature_wrong"], {})
    # A package of which the log knows nothing.
    report.sha256 = "0" * 64
    assert report.find_in(sealed.log) is None
    assert [one.code for one in report.problems] == ["log_line_missing"]
    sealed.log.write_bytes(sealed.log.read_bytes().replace(b'"local"', b'"lacol"'))
    assert named.find_in(sealed.log) == number
    assert {one.code for one in named.problems} == {"log_altered", "log_line_differs"}


def test_the_export_is_found_in_an_earlier_file_of_the_log(sealed, package, keys, monkeypatch):
    report = Package(package, keys / "site.pub")
    number = report.find_in(sealed.log)
    monkeypatch.setattr(QueryLog, "most_bytes", 1000)
    for sentence in ("red", "blue", "green"):
        sealed.client.search(sentence=sentence)
    assert report.sha256 not in sealed.log.read_text()
    assert (report.find_in(sealed.log), report.problems) == (number, [])


def test_a_package_can_be_verified_unpacked_by_other_programs(package, keys, tmp_path):
    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(package) as archive:
        archive.extractall(folder)
    verify = ("verify", "key", folder, "--signature", folder / "manifest.sig", "--public_key")
    assert model_signing((*verify, keys / "site.pub"), (*verify, keys / "other.pub")) == [0, 1]


def rewritten(package, change, **more):
    """A copy of a package; ``change`` gets and returns its (name, content) pairs."""
    file = package.with_name("changed.zip")
    with zipfile.ZipFile(file, "w", **more) as archive:
        for name, content in change([*files_of(package).items()]):
            archive.writestr(zipfile.ZipInfo(name) if not more else name, content)
    return file


def picture_changed(members):
    return [(n, c[:-1] + b"x" if n.startswith("pictures/") else c) for n, c in members]


def resealed(members):
    """Another picture, and hashes that fit it."""
    files = dict(members)
    name = next(name for name in files if name.startswith("pictures/"))
    files[name] = b"\xff\xd8\xff another"
    manifest = json.loads(files["manifest.json"])
    manifest["sha256"][name] = hashlib.sha256(files[name]).hexdigest()
    manifest["signed_by"] = "e" * 64
    files["manifest.json"] = json.dumps(manifest).encode()
    return files.items()


def without(name, change=list):
    return lambda members: [one for one in change(members) if one[0] != name]


def with_member(name, content=b"x"):
    """Add a member, or replace its content."""
    return lambda members: [*without(name)(members), (name, content)]


CHANGES = [
    (picture_changed, "hash_differs"),
    (with_member("index.html"), "hash_differs"),
    (without("items.json"), "member_missing"),
    (with_member("more.html"), "member_unexpected"),
    (with_member("../../x.txt"), "name_unsafe"),
    (with_member("/etc/passwd"), "name_unsafe"),
    (without("manifest.sig"), "not_signed"),
    (without("manifest.json"), "member_missing"),
    (resealed, "manifest_differs"),
    (lambda members: [], "not_signed"),
    (with_member("manifest.sig", b"{}"), "signature_malformed"),
]


def test_a_change_is_found(package, keys):
    for change, code in CHANGES:
        report = Package(rewritten(package, change), keys / "site.pub")
        assert code in {one.code for one in report.problems}
    # Without a signature nobody is named, whatever the manifest says.
    unsigned = rewritten(package, without("manifest.sig", resealed))
    report = Package(unsigned)
    assert (report.problems, report.signature, report.signed_by) == ([], "none", None)
    plain = run_rt("evidence", "verify", unsigned)
    assert (plain.exit_code, "e" * 64 in plain.stdout) == (0, False)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_tricks_of_the_container_are_found(package, keys):
    def codes(file):
        return {one.code for one in Package(file, keys / "site.pub").problems}

    assert codes(rewritten(package, lambda m: m)) == set()
    assert "member_duplicate" in codes(rewritten(package, lambda m: [*m, m[0]]))
    packed = rewritten(package, lambda m: m, compression=zipfile.ZIP_DEFLATED)
    assert "member_compressed" in codes(packed)
    nul = rewritten(package, lambda m: [*m, ("items.jsonX.exe", b"x")])
    nul.write_bytes(nul.read_bytes().replace(b"jsonX.exe", b"json\0.exe"))
    assert "name_unsafe" in codes(nul)
    content = package.read_bytes()
    place = content.index(b"PK\1\2")
    for changed in (content + b"more", b"#!/bin/sh\n" + content,
                    content[:place] + b"hidden" + content[place:]):  # fmt: skip
        package.write_bytes(changed)
        assert codes(package) & {"bytes_hidden", "zip_damaged"}
    for end in (0, 10, len(content) // 2, len(content) - 1):
        package.write_bytes(content[:end])
        assert "zip_damaged" in codes(package)


def test_a_member_that_stream_readers_see_differently_is_found(package, keys):
    """They read the headers before the members, which have flags, method, CRC, sizes and name."""
    with zipfile.ZipFile(package) as archive:
        header = archive.getinfo("items.json").header_offset
    before = package.read_bytes()
    for place, content in (
        (6, b"\x08"), (8, b"\x08"), (14, b"\0\0\0\0"), (18, b"\1\0\0\0"), (22, b"\1\0\0\0"),
        (28, b"\4"), (30, b"x"),
    ):  # fmt: skip
        begin = header + place
        package.write_bytes(before[:begin] + content + before[begin + len(content) :])
        problems = Package(package, keys / "site.pub").problems
        assert {one.code for one in problems} & {"member_differs", "zip_damaged"}, place


@pytest.mark.parametrize("is_large", [True, False])
def test_a_long_list_of_members_is_refused_before_it_is_read(tmp_path, monkeypatch, is_large):
    listed = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 9, 1, *[0] * 6) + b"a"
    count = 60_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(listed) * count, 0, 0)
    if is_large:
        end = b"PK\6\7" + bytes(16) + end[:12] + b"\xff" * 8 + end[20:]
    file = tmp_path / "many.zip"
    file.write_bytes(listed * count + end)
    monkeypatch.setattr(zipfile, "ZipFile", lambda file: pytest.fail("it is read"))
    assert [one.code for one in Package(file).problems] == ["zip_damaged"]


def test_a_changed_byte_at_any_place_is_found(package, keys):
    """Each byte of the headers and of the list of members; some of the contents."""
    content = package.read_bytes()
    with zipfile.ZipFile(package) as archive:
        places = {*range(archive.start_dir, len(content)), *range(0, len(content), 97)}
        for one in archive.infolist():
            begin = one.header_offset + 30 + len(one.filename)
            step = 29 if one.filename == "manifest.sig" else one.file_size
            places |= {*range(one.header_offset, begin), *range(begin, begin + one.file_size, step)}
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 0x20 if place % 2 else 1
        package.write_bytes(changed)
        assert Package(package, keys / "site.pub").problems, place


def signature_changed(change):
    """Write a signature differently; what is signed stays."""

    def changed(members):
        files = dict(members)
        return with_member("manifest.sig", change(files["manifest.sig"].decode()).encode())(members)

    return changed


def negated(text):
    """The other one of two signatures that ECDSA accepts."""
    signed = json.loads(text)
    (one,) = signed["dsseEnvelope"]["signatures"]
    r, s = decode_dss_signature(base64.b64decode(one["sig"]))
    other = encode_dss_signature(r, ORDER - s)
    one["sig"] = base64.b64encode(other).decode()
    return json.dumps(signed, indent=2) + "\n"


def hinted(text):
    signed = json.loads(text)
    signed["verificationMaterial"]["publicKey"]["hint"] = "another key"
    return json.dumps(signed, indent=2) + "\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-1],
        lambda text: text + "\n",
        lambda text: text.replace("\n", "\r\n"),
        lambda text: json.dumps(json.loads(text)),
        lambda text: text.replace('"hint": "', '"hint": "\\u0030', 1),
        lambda text: text.replace('"tlogEntries": []', '"tlogEntries": [1]'),
        negated,
        hinted,
    ],
)
def test_a_signature_that_is_written_differently_is_found(package, keys, change):
    changed = rewritten(package, signature_changed(change))
    report = Package(changed, keys / "site.pub")
    assert [one.code for one in report.problems] == ["signature_differs"]


@pytest.mark.parametrize("change", [lambda m: m[1:] + m[:1], lambda m: m[:-2] + m[:-3:-1]])
def test_members_in_another_order_or_of_another_date_are_found(package, keys, change):
    report = Package(rewritten(package, change), keys / "site.pub")
    assert "member_differs" in {one.code for one in report.problems}
    with zipfile.ZipFile(file := package.with_name("later.zip"), "w") as archive:
        for name, content in files_of(package).items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 11, 30, 12, 0, 0)), content)
    report = Package(file, keys / "site.pub")
    assert "member_differs" in {one.code for one in report.problems}


def of_first_version(package, key):
    """A package as earlier releases wrote it: with dates, and either one of two signatures."""
    files = files_of(package)
    manifest = json.loads(files["manifest.json"])
    files["manifest.json"] = (
        json.dumps(manifest | {"schema_version": 1}, indent=2) + "\n"
    ).encode()
    signed = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    del signed["manifest.sig"]
    text = sign_files(dict(sorted(signed.items())), key, "upperson-evidence", ["manifest.sig"])
    files["manifest.sig"] = negated(text).encode()
    file = package.with_name("earlier.zip")
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (2026, 11, 30, 12, 0, 0)), content)
    return file


def test_a_package_of_an_earlier_release_is_verified(package, keys):
    file = of_first_version(package, read_private_key(keys / "site.pem"))
    report = Package(file, keys / "site.pub")
    assert (report.problems, report.signature) == ([], "trusted")
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        place = archive.start_dir + 38  # The access mode of a member.
    file.write_bytes(content[:place] + b"\1" + content[place + 1 :])
    assert Package(file, keys / "site.pub").problems


VERIFY = "from upperson_rt.program import main; main()"


def test_the_command_needs_no_web_packages_and_checks_hashes_without_cryptography(
    sealed, package, keys
):
    def verified(file, without, *more):
        arguments = ("evidence", "verify", file, "--trust", keys / "site.pub", "--json", *more)
        done = run_code(VERIFY, *arguments, without=without)
        return done.returncode, json.loads(done.stdout)

    web = ["fastapi", "starlette", "jinja2", "uvicorn"]
    code, result = verified(package, web, "--log", sealed.log)
    assert (code, result["ok"], result["signature"]) == (0, True, "trusted")
    assert result["log_line"] == len(log_lines(sealed))
    cryptography = ["cryptography", "rfc3161_client"]
    code, result = verified(package, cryptography)
    assert (code, result["ok"], result["problems"]) == (5, False, [])
    assert result["signature"] == "not_checked"
    code, result = verified(rewritten(package, picture_changed), cryptography)
    assert (code, result["problems"][0]["code"]) == (6, "hash_differs")


def test_the_command_ends_with_6_and_a_code_on_any_difference(sealed, package, keys):
    changed = rewritten(package, picture_changed)
    command = ("evidence", "verify", changed)
    failed = run_rt(*command, "--trust", keys / "site.pub", "--json")
    problem = json.loads(failed.stdout)["problems"][0]
    assert (failed.exit_code, problem["code"]) == (6, "hash_differs")
    assert problem["path"].startswith("pictures/")
    plain = run_rt(*command)
    assert (plain.exit_code, "hash_differs" in plain.stdout) == (6, True)
    assert run_rt("evidence", "verify", package, "--log", package).exit_code == 6
    refusal(run_rt("evidence", "verify", package.parent, "--json"), 3, "package_unreadable")
    refusal(run_rt("evidence", "verify", package, "--trust", package, "--json"), 3, "key_unusable")
    plain = run_rt("evidence", "verify", package, "--trust", keys / "site.pub", "--log", sealed.log)
    assert plain.exit_code == 0
    for part in ("trusted key", "user: local", "sentence: red coat", "pictures: 2", "line 1 of"):
        assert part in plain.stdout
