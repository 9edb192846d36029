import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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
    files_of_signature,
    named_key,
    read_private_key,
    sign_files,
    sign_folder,
    verify_folder,
)


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, curve in {
        "ours": ec.SECP256R1(), "other": ec.SECP256R1(), "large": ec.SECP521R1(),
        "bitcoin": ec.SECP256K1(),
    }.items():  # fmt: skip
        write_keys(folder, name, ec.generate_private_key(curve))
    write_keys(folder, "locked", ec.generate_private_key(ec.SECP256R1()), b"word")
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


def added(path):
    (path.parent / "plugin.py").write_text("boom")


def changed(path):
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))


def linked(path):
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def edited(change):
    def edit(path):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def renamed(content):
    payload = base64.b64decode(content["dsseEnvelope"]["payload"])
    assert b"toy" in payload
    payload = base64.b64encode(payload.replace(b"toy", b"try", 1))
    content["dsseEnvelope"]["payload"] = payload.decode()


@pytest.mark.parametrize(
    ("name", "damage", "code", "path"),
    [
        ("model.sig", Path.unlink, "not_signed", None),
        ("model.sig", added, "file_added", "plugin.py"),
        ("text.fp32.onnx", Path.unlink, "file_missing", "text.fp32.onnx"),
        ("bundle.json", changed, "file_changed", "bundle.json"),
        ("text.fp32.onnx", linked, "irregular_file", "text.fp32.onnx"),
        ("pipe", os.mkfifo, "irregular_file", "pipe"),
        ("model.sig", linked, "irregular_file", "model.sig"),
        ("model.sig", changed, "signature_malformed", None),
        ("model.sig", edited(renamed), "signature_wrong", None),
        ("model.sig", edited(lambda c: c.pop("dsseEnvelope")), "signature_malformed", None),
        ("model.sig", lambda path: path.write_bytes(b"[" * 10**5), "signature_malformed", None),
        ("model.sig", lambda path: path.write_bytes(b"\xff"), "signature_malformed", None),
    ],
)
def test_what_is_not_as_it_was_signed_is_refused_unread(
    folder, keys, monkeypatch, name, damage, code, path
):
    damage(folder / name)
    monkeypatch.setattr(bundle_module, "parse_manifest", lambda *_, **__: pytest.fail("parsed"))
    with refused(code, IntegrityError, path=path):
        Bundle.open(folder, trust=keys / "ours.pub")


def test_another_key_is_refused(folder, keys):
    for name in ("other", "large"):
        with refused("signature_wrong", IntegrityError, named=named_key(folder)):
            Bundle.open(folder, trust=keys / f"{name}.pub")
    ours = named_key(folder)
    sign_folder(folder, read_private_key(keys / "other.pem"), "toy")
    rename = edited(lambda content: content["verificationMaterial"]["publicKey"].update(hint=ours))
    rename(folder / "model.sig")
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
    files = files_of_signature((folder / "model.sig").read_bytes(), None, "it")
    left_out = [*signature._UNSIGNED, "plugin.py"]
    text = sign_files(files, read_private_key(keys / "ours.pem"), "toy", left_out)
    (folder / "model.sig").write_text(text)
    added(folder / "model.sig")
    with refused("file_added", IntegrityError, path="plugin.py"):
        verify_folder(folder, keys / "ours.pub")


def test_it_is_the_format_of_model_signing(folder, keys, tmp_path):
    """Its command takes our signature, and we take its."""
    more, theirs = (shutil.copytree(folder, tmp_path / name) for name in ("more", "theirs"))
    added(more / "model.sig")
    (theirs / "model.sig").unlink()

    def command(verb, place, kind, key):
        return verb, "key", place, "--signature", place / "model.sig", f"--{kind}_key", keys / key

    assert model_signing(
        command("verify", folder, "public", "ours.pub"),
        command("verify", folder, "public", "other.pub"),
        command("verify", more, "public", "ours.pub"),
        command("sign", theirs, "private", "large.pem"),
    ) == [0, 1, 1, 0]
    assert verify_folder(theirs, keys / "large.pub") == named_key(theirs)
    added(theirs / "model.sig")
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
