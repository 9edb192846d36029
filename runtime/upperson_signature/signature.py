"""A signed folder or archive: whose it is, and that nothing in it was changed, added or taken away.

The signature is a file in it, of OpenSSF's Model Signing 1.0 with an own key: a Sigstore
bundle around an in-toto statement that names each file with its SHA-256. The command
``model_signing`` of the Python package model-signing reads and writes the same. Nothing here needs
a network; the package cryptography is imported when it is needed.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from upperson_rt.arguments import check_path
from upperson_rt.errors import InputError, IntegrityError, missing_extra
from upperson_rt.files import sha256_of_file, write_atomically
from upperson_rt.manifest import SIGNATURE_FILE
from upperson_rt.printable import escape_for_display
from upperson_rt.strict import Sha256, parse_json, read_fields

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PAYLOAD_TYPE = "application/vnd.in-toto+json"
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://model_signing/signature/v1.0"

_UNSIGNED = (SIGNATURE_FILE, ".git", ".gitattributes", ".github", ".gitignore")
"""What a statement may leave out: nothing here reads git's files."""

SIGNATURE_BYTES = 1 << 20
"""Of a signature or key, at most."""

_HASHES = {"secp256r1": "SHA256", "secp384r1": "SHA384", "secp521r1": "SHA512"}
"""The hash that goes with each curve."""


def sign_folder(folder: Path, key: "ec.EllipticCurvePrivateKey", name: str) -> str:
    """Write the signature of all files in a folder, in place of an earlier one.

    The name of the model is for people. Returns the fingerprint of the key.

    Raises:
        InputError: The folder cannot be read or written.
        IntegrityError: There is a link or a device in it.
    """
    files = {file: _digest(folder / file) for file in sorted(_files(folder, _UNSIGNED))}
    write_atomically(folder / SIGNATURE_FILE, sign_files(files, key, name))
    return key_fingerprint(key.public_key())


def sign_files(
    files: Mapping[str, str],
    key: "ec.EllipticCurvePrivateKey",
    name: str,
    left_out: Sequence[str] = _UNSIGNED,
) -> str:
    """Return a signature, as JSON text, of files by the SHA-256 of their POSIX paths.

    ``left_out`` are files beside them that are not signed, such as the signature itself.
    """
    resources = [
        {"name": file, "algorithm": "sha256", "digest": digest} for file, digest in files.items()
    ]
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": _digest_of_all(files)}}],
        "predicateType": _PREDICATE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(left_out),
            },
            "resources": resources,
        },
    }
    payload = json.dumps(statement, indent=2).encode()
    while not _is_lower(made := key.sign(_encoded(payload), _ecdsa(key)), key.key_size):
        pass  # Every second one is.
    return _text(payload, made, key_fingerprint(key.public_key()))


def _text(payload: bytes, signature: bytes, fingerprint: str) -> str:
    """Return a signature as it is written."""
    signed = {
        "mediaType": _MEDIA_TYPE,
        "verificationMaterial": {"publicKey": {"hint": fingerprint}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": base64.b64encode(signature).decode()}],
        },
    }
    return json.dumps(signed, indent=2) + "\n"


def _is_lower(signature: bytes, key_bits: int) -> bool:
    """Return whether a signature is the lower of two: ECDSA accepts both s and n - s."""
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    return decode_dss_signature(signature)[1].bit_length() < key_bits


def verify_folder(folder: Path, public_key: str | os.PathLike[str]) -> str:
    """Make sure that the owner of a key (a file in PEM) has signed a folder as it is.

    Nothing in it is read but the signature until that is found genuine, and nothing is parsed then.
    Returns the fingerprint of the key: SHA-256 of its file as openssl writes it.

    Raises:
        InputError: The key cannot be used, or a file cannot be read.
        IntegrityError: The folder is not signed, or by another key; a file was changed, added or
            taken away; or there is a link or a device in it.
        BackendError: The package cryptography is missing.
    """
    key = read_public_key(public_key)
    payload = _genuine_payload(folder, _read_signature(folder), key)
    signed, left_out = _read_statement(payload, f"{folder / SIGNATURE_FILE}, the statement")
    found = set(_files(folder, left_out))
    for names, problem, code in (
        (found - signed.keys(), "was added after it was signed", "file_added"),
        (signed.keys() - found, "is signed, but is not there", "file_missing"),
    ):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise _refused(folder, f"{min(names)!r}{more} {problem}", code, path=min(names))
    for name, digest in signed.items():
        if _digest(folder / name) != digest:
            problem = f"{name!r} was changed after it was signed"
            raise _refused(folder, problem, "file_changed", path=name)
    return key_fingerprint(key)


def files_of_signature(
    content: bytes, public_key: "ec.EllipticCurvePublicKey | None", place: str
) -> dict[str, str]:
    """Return the SHA-256 of each file that a signature names, by its POSIX path.

    It must be of ``public_key``; with None any key's is taken, unchecked. ``place`` is what
    messages name. Raises IntegrityError as `verify_folder`.
    """
    found = _parse_signature(content, place)
    payload = found.payload
    if public_key is not None:
        payload = _genuine_payload(place, found, public_key)
    return _read_statement(payload, f"{place}, the statement")[0]


def is_as_signed(content: bytes, key: "ec.EllipticCurvePublicKey", place: str) -> bool:
    """Return whether a genuine signature is byte for byte one that `sign_files` writes.

    Other programs write other JSON, and earlier releases signatures that are not the lower ones.
    """
    found = _parse_signature(content, place)
    text = _text(found.payload, found.signature, key_fingerprint(key))
    return content == text.encode() and _is_lower(found.signature, key.key_size)


def key_named_in(content: bytes, place: str) -> str:
    """Return the fingerprint that a signature names, unchecked."""
    return _parse_signature(content, place).named_key


def named_key(folder: Path) -> str | None:
    """Return the fingerprint that a signature names; unchecked, and None for no signature."""
    if not os.path.lexists(folder / SIGNATURE_FILE):
        return None
    return _read_signature(folder).named_key


def read_private_key(path: str | os.PathLike[str]) -> "ec.EllipticCurvePrivateKey":
    """Read a private key in PEM that `sign_folder` takes."""
    curves, serialization, unsupported = _cryptography()
    content = _read_key_file(path)
    try:
        key = serialization.load_pem_private_key(content, None)
    except TypeError as error:
        name = os.fspath(path)
        message = f"the key {name} has a passphrase: pass it unlocked, in bash for example  "
        message += f"<(openssl pkey -in {name})"
        raise InputError(message, code="key_locked", path=name) from error
    except (ValueError, unsupported) as error:
        raise _unusable_key(path, "private") from error
    if not isinstance(key, curves.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise _unusable_key(path, "private")
    return cast("ec.EllipticCurvePrivateKey", key)


def read_public_key(path: str | os.PathLike[str]) -> "ec.EllipticCurvePublicKey":
    """Read the one public key of a file in PEM."""
    curves, serialization, unsupported = _cryptography()
    content = _read_key_file(path)
    blocks = content.count(b"-----BEGIN ")
    if blocks > 1:  # Only the first one would be read.
        message = f"{os.fspath(path)} holds {blocks} keys, expected one: put the one to trust into"
        raise InputError(f"{message} a file of its own", code="several_keys", count=blocks)
    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, unsupported) as error:
        raise _unusable_key(path, "public") from error
    if not isinstance(key, curves.EllipticCurvePublicKey) or key.curve.name not in _HASHES:
        raise _unusable_key(path, "public")
    return cast("ec.EllipticCurvePublicKey", key)


def _cryptography() -> tuple[Any, Any, type[Exception]]:
    """Return curves, what reads keys, and its error for a kind of key or curve that it lacks."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise missing_extra("cryptography", "sign", "a signature") from error
    return ec, serialization, UnsupportedAlgorithm


def _read_key_file(path: str | os.PathLike[str]) -> bytes:
    try:
        with open(check_path(path, "a key"), "rb") as file:
            return file.read(SIGNATURE_BYTES)
    except OSError as error:
        message = f"cannot read the key {os.fspath(path)}: {error.strerror}"
        raise InputError(message, code="key_unreadable", path=os.fspath(path)) from error


def _unusable_key(path: str | os.PathLike[str], kind: Literal["private", "public"]) -> InputError:
    make = {
        "private": "openssl ecparam -name prime256v1 -genkey -noout -out signing.pem",
        "public": "openssl pkey -in signing.pem -pubout -out signing.pub",
    }[kind]
    name = os.fspath(path)
    message = f"{name} is not a {kind} key in PEM on the curve P-256, P-384 or P-521, as made by  "
    return InputError(message + make, code="key_unusable", kind=kind, path=name)


def _ecdsa(key: Any) -> Any:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.ECDSA(getattr(hashes, _HASHES[key.curve.name])())


def key_fingerprint(key: "ec.EllipticCurvePublicKey") -> str:
    """Return the SHA-256 of a public key's file as openssl writes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    pem = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def _encoded(payload: bytes) -> bytes:
    """Return what is really signed: DSSE's encoding of a payload with its type."""
    kind = _PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _digest(file: Path) -> str:
    try:
        return sha256_of_file(file)
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error


def _digest_of_all(files: Mapping[str, str]) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, files.values()))).hexdigest()


@dataclass(frozen=True)
class _Signature:
    payload: bytes
    signature: bytes
    named_key: str


def _read_signature(folder: Path) -> _Signature:
    file = folder / SIGNATURE_FILE
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            problem = f"{SIGNATURE_FILE} is not a plain file"
            raise _refused(folder, problem, "irregular_file", path=SIGNATURE_FILE)
        with file.open("rb") as stream:
            content = stream.read(SIGNATURE_BYTES + 1)
    except FileNotFoundError as error:
        problem = f"it is not signed (there is no {SIGNATURE_FILE})"
        raise _refused(folder, problem, "not_signed") from error
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    return _parse_signature(content, folder)


def _parse_signature(content: bytes, place: Path | str) -> _Signature:
    try:
        signed = parse_json(content[:SIGNATURE_BYTES].decode("utf-8"), SIGNATURE_FILE)
        envelope = signed["dsseEnvelope"]
        (one,) = envelope["signatures"]
        if (signed["mediaType"], envelope["payloadType"]) != (_MEDIA_TYPE, _PAYLOAD_TYPE):
            raise ValueError(f"expected a signature of the type {_MEDIA_TYPE}")
        key = signed["verificationMaterial"].get("publicKey") or {}
        return _Signature(
            base64.b64decode(envelope["payload"], validate=True),
            base64.b64decode(one["sig"], validate=True),
            escape_for_display(str(key.get("hint") or "no name")[:64]),
        )
    except (InputError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = "its signature is not one of Model Signing 1.0 with a key"
        raise _refused(place, problem, "signature_malformed") from error


def _genuine_payload(
    place: Path | str, found: _Signature, key: "ec.EllipticCurvePublicKey"
) -> bytes:
    """Return the signed bytes, once the signature is found to be the key's."""
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(found.signature, _encoded(found.payload), _ecdsa(key))
    except InvalidSignature as error:
        trusted = key_fingerprint(key)
        by = "it was changed" if found.named_key == trusted else f"its key is {found.named_key!r}"
        problem = f"its signature is not one of the trusted key sha256:{trusted} ({by})"
        raise _refused(place, problem, "signature_wrong", named=found.named_key) from error
    return found.payload


@dataclass(frozen=True, kw_only=True)
class _Resource:
    name: str
    algorithm: Literal["sha256"]
    digest: Sha256


def _read_statement(payload: bytes, where: str) -> tuple[dict[str, str], set[str]]:
    """Return SHA-256 by name of the signed files, and which names the statement leaves out."""
    try:
        statement = parse_json(payload.decode("utf-8"), where)
        predicate = statement["predicate"]
        serialization = predicate["serialization"]
        kinds = (
            statement["_type"],
            statement["predicateType"],
            serialization["method"],
            serialization["hash_type"],
        )
        if kinds != (_STATEMENT, _PREDICATE, "files", "sha256"):
            raise InputError(f"{where}: expected SHA-256 of whole files, found {kinds}")
        resources = [read_fields(_Resource, found, where) for found in predicate["resources"]]
        files = {resource.name: resource.digest for resource in resources}
        (subject,) = statement["subject"]
        if len(files) < len(resources) or subject["digest"]["sha256"] != _digest_of_all(files):
            raise InputError(f"{where}: its files do not add up to its subject")
        return files, {SIGNATURE_FILE, *serialization.get("ignore_paths", ())} & {*_UNSIGNED}
    except (InputError, ValueError, LookupError, TypeError, AttributeError) as error:
        problem = str(error) if isinstance(error, InputError) else f"{where} is malformed"
        raise IntegrityError(
            f"{problem}: sign the folder again, with the options that "
            "docs/explanation/security.md names",
            code="statement_malformed",
        ) from error


def _files(folder: Path, skipped: Collection[str]) -> Iterator[str]:
    """Yield the POSIX path of each file in a folder, but for some names at its top."""
    for place, folders, files in os.walk(folder, onerror=_unreadable):
        at_top = Path(place) == folder
        folders[:] = [name for name in folders if not (at_top and name in skipped)]
        for name in (*folders, *files):
            path = Path(place, name)
            mode = path.lstat().st_mode
            if (at_top and name in skipped) or stat.S_ISDIR(mode):
                continue
            relative = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(mode):
                problem = f"{relative!r} is a link or a device, expected a file"
                raise _refused(folder, problem, "irregular_file", path=relative)
            yield relative


def _unreadable(error: OSError) -> None:
    raise InputError(f"cannot read {error.filename}: {error.strerror}") from error


def _refused(place: Path | str, problem: str, code: str, **fields: str) -> IntegrityError:
    return IntegrityError(
        f"{place} is not trusted: {problem}. Get it again from its signer",
        code=code,
        **fields,
    )
