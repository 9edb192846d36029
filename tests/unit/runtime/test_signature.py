import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

import upperson_rt
from tests.helpers.refused import refused
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt import bundle as bundle_module
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_signature import signature
from upperson_signature.signature import (
    named_key,
    read_private_key,
    sign_files,
    sign_folder,
    signed_digests,
    verify_folder,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    write_keys(folder, "ours", ec.generate_private_key(ec.SECP256R1()))
    write_keys(folder, "other", ec.generate_private_key(ec.SECP256R1()))
    write_keys(folder, "large", ec.generate_private_key(ec.SECP521R1()))
    write_keys(folder, "locked", ec.generate_private_key(ec.SECP256R1()), b"word")
    write_keys(folder, "bitcoin", ec.generate_private_key(ec.SECP256K1()))
    write_keys(folder, "edwards", ed25519.Ed25519PrivateKey.generate())
    # On a curve, SM2, that the package has never heard of.
    for name in ("bitcoin.pem", "bitcoin.pub"):
        start, *lines, end = (folder / name).read_text().split("\n")[:-1]
        content = base64.b64decode("".join(lines))
        content = content.replace(bytes.fromhex("06052b8104000a"), bytes.fromhex("06052a811ccf55"))
        text = "\n".join([start, base64.b64encode(content).decode(), end, ""])
        (folder / name.replace("bitcoin", "chinese")).write_text(text)
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory, keys):
    folder = make_toy_bundle(tmp_path_factory.mktemp("signed") / "bundle")
    sign_folder(folder, read_private_key(keys / "ours.pem"), "toy")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "bundle")


def model_signing(*commands):
    """Run commands of the Python package model-signing, as it is; return their exit codes."""
    program = (
        "import json, sys; from click.testing import CliRunner; from model_signing._cli import "
        "main; print([CliRunner().invoke(main, c).exit_code for c in json.loads(sys.argv[1])])"
    )
    texts = json.dumps([list(map(str, command)) for command in commands])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, texts], capture_output=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_signed_bundle_opens_for_who_trusts_its_key(folder, keys):
    public = keys / "ours.pub"
    encoder = upperson_rt.open(folder, backend="onnxruntime", threads=1, trust=public)
    assert encoder.encode_texts(["red"]).shape == (1, 16)
    Bundle.open(folder)  # Nobody has to insist.
    fingerprint = verify_folder(folder, os.fspath(public))
    assert named_key(folder) == fingerprint
    assert hashlib.sha256(public.read_bytes()).hexdigest() == fingerprint


def added(folder):
    (folder / "plugin.py").write_text("boom")


def changed(name):
    def change(folder):
        path = folder / name
        *kept, last = path.read_bytes()
        path.write_bytes(bytes([*kept, last ^ 1]))

    return change


def linked(name):
    def change(folder):
        (folder / name).rename(folder.parent / name)
        (folder / name).symlink_to(folder.parent / name)

    return change


def edited(change):
    def edit(folder):
        path = folder / "model.sig"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def edited_statement(old, new):
    def change(content):
        payload = base64.b64decode(content["dsseEnvelope"]["payload"])
        assert old in payload
        changed = payload.replace(old, new, 1)
        content["dsseEnvelope"]["payload"] = base64.b64encode(changed).decode()

    return edited(change)


MALFORMED = ("signature_malformed", {})
UNTRUE = ("signature_wrong", {})


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "model.sig").unlink(), ("not_signed", {})),
        (added, ("file_added", {"path": "plugin.py"})),
        (lambda folder: (folder / "text.fp32.onnx").unlink(),
         ("file_missing", {"path": "text.fp32.onnx"})),
        (changed("bundle.json"), ("file_changed", {"path": "bundle.json"})),
        (linked("text.fp32.onnx"), ("irregular_file", {"path": "text.fp32.onnx"})),
        (lambda folder: os.mkfifo(folder / "pipe"), ("irregular_file", {"path": "pipe"})),
        (linked("model.sig"), ("irregular_file", {"path": "model.sig"})),
        (changed("model.sig"), MALFORMED),
        (edited_statement(b"toy", b"try"), UNTRUE),
        (edited(lambda content: content.pop("dsseEnvelope")), MALFORMED),
        (lambda folder: (folder / "model.sig").write_bytes(b"[" * 10**5), MALFORMED),
        (lambda folder: (folder / "model.sig").write_bytes(b"\xff"), MALFORMED),
    ],
)  # fmt: skip
def test_what_is_not_as_it_was_signed_is_refused_unread(
    folder, keys, monkeypatch, damage, expected
):
    damage(folder)
    monkeypatch.setattr(bundle_module, "parse_manifest", lambda *_, **__: pytest.fail("parsed"))
    code, fields = expected
    with refused(code, IntegrityError, **fields):
        Bundle.open(folder, trust=keys / "ours.pub")


def test_another_key_is_refused(folder, keys):
    for name in ("other", "large"):
        with refused("signature_wrong", IntegrityError, named=named_key(folder)):
            Bundle.open(folder, trust=keys / f"{name}.pub")
    ours = named_key(folder)
    sign_folder(folder, read_private_key(keys / "other.pem"), "toy")
    edited(lambda content: content["verificationMaterial"]["publicKey"].update(hint=ours))(folder)
    assert named_key(folder) == ours  # What a signature says of its key proves nothing.
    with refused("signature_wrong", IntegrityError, named=ours):
        Bundle.open(folder, trust=keys / "ours.pub")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"sha256"', '"blake2"'),
        ('"files"', '"shard"'),
        ("Statement/v1", "Statement/v9"),
        ('"bundle.json"', '"canaries.npz"'),
        ('"predicate"', '"predictor"'),
    ],
)
def test_statements_of_another_kind_are_refused(folder, keys, monkeypatch, old, new):
    """Their signature is right: the owner of the key may have used another program."""
    dumps = json.dumps
    monkeypatch.setattr(
        signature.json, "dumps", lambda *args, **more: dumps(*args, **more).replace(old, new, 1)
    )
    sign_folder(folder, read_private_key(keys / "ours.pem"), "toy")
    monkeypatch.undo()
    with refused("statement_malformed", IntegrityError):
        verify_folder(folder, keys / "ours.pub")


def test_files_of_git_may_lie_beside_it_and_nowhere_else(folder, keys):
    (folder / ".git").mkdir()
    (folder / ".git" / "config").touch()
    (folder / ".gitattributes").touch()
    assert verify_folder(folder, keys / "ours.pub")
    for name in (".gitattributes", ".git/config"):
        place = folder / "more" / name
        place.parent.mkdir(parents=True)
        place.touch()
        with refused("file_added", IntegrityError, path=f"more/{name}"):
            verify_folder(folder, keys / "ours.pub")
        shutil.rmtree(folder / "more")
    # Nor anything else, whatever a statement leaves out.
    files = signed_digests(folder, keys / "ours.pub")
    left_out = [*signature._UNSIGNED, "plugin.py"]
    text = sign_files(files, read_private_key(keys / "ours.pem"), "toy", left_out)
    (folder / "model.sig").write_text(text)
    added(folder)
    with refused("file_added", IntegrityError, path="plugin.py"):
        verify_folder(folder, keys / "ours.pub")


def test_it_is_the_format_of_model_signing(folder, keys, tmp_path):
    """Its command takes our signature, and we take its."""
    more, theirs = tmp_path / "more", tmp_path / "theirs"
    for copy in (more, theirs):
        shutil.copytree(folder, copy)
    added(more)
    (theirs / "model.sig").unlink()
    verify, sign = (
        lambda place: ("verify", "key", place, "--signature", place / "model.sig"),
        ("sign", "key", theirs, "--signature", theirs / "model.sig"),
    )
    assert model_signing(
        (*verify(folder), "--public_key", keys / "ours.pub"),
        (*verify(folder), "--public_key", keys / "other.pub"),
        (*verify(more), "--public_key", keys / "ours.pub"),
        (*sign, "--private_key", keys / "large.pem"),
    ) == [0, 1, 1, 0]
    assert verify_folder(theirs, keys / "large.pub") == named_key(theirs)
    added(theirs)
    with refused("file_added", IntegrityError, path="plugin.py"):
        verify_folder(theirs, keys / "large.pub")


def test_keys_that_cannot_be_used(folder, keys, tmp_path):
    with refused("key_unreadable", InputError, path=str(tmp_path / "none.pem")):
        read_private_key(tmp_path / "none.pem")
    with refused("key_locked", InputError):
        read_private_key(keys / "locked.pem")
    for name in ("ours.pub", "bitcoin.pem", "edwards.pem", "chinese.pem"):
        with refused("key_unusable", InputError, kind="private", path=str(keys / name)):
            read_private_key(keys / name)
    for name in ("ours.pem", "bitcoin.pub", "edwards.pub", "chinese.pub"):
        with refused("key_unusable", InputError, kind="public", path=str(keys / name)):
            verify_folder(tmp_path, keys / name)
    both = tmp_path / "both.pub"  # The second one would seem to be trusted.
    both.write_bytes((keys / "ours.pub").read_bytes() + (keys / "other.pub").read_bytes())
    with refused("several_keys", InputError, count=2):
        Bundle.open(folder, trust=both)


def test_the_package_is_named_where_it_is_missing(folder, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    with refused("extra_missing", BackendError, extra="sign"):
        Bundle.open(folder, trust=keys / "ours.pub")
    Bundle.open(folder)
