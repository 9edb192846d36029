"""The format of an evidence package, and its verification, which needs neither server nor network.

A package may come from anyone: its members are read within limits and never unpacked.
"""

import hashlib
import json
import re
import stat
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.log_chain import verify_log
from upperson_rt.printable import safe_repr
from upperson_rt.signature import (
    SIGNATURE_BYTES,
    files_of_signature,
    key_fingerprint,
    key_named_in,
    read_public_key,
)
from upperson_rt.strict import Count, Sha256, parse_json, read_fields

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

KIND = "upperson-evidence"
VERSION = 1
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
_MOST_MEMBERS = 20_000
_MOST_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_NAME = re.compile(r"(?:(?:pictures|frames|clips)/)?[a-z0-9]+\.[a-z0-9]{1,8}")
_LOCAL_BYTES, _LISTED_BYTES, _END_BYTES = 30, 46, 22
"""Of a zip beside names and contents: for a member, in the list of members, and at the end."""
_LONGEST_LINE = 64 << 20
SignatureState: TypeAlias = Literal["trusted", "not_checked", "none", "wrong"]


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Who signs the packages of a server, and what is known of the signature of its bundle."""

    key: "ec.EllipticCurvePrivateKey | None" = None
    bundle: Mapping[str, Any] = field(
        default_factory=lambda: {"signed_by": None, "verified": False}
    )
    """``signed_by`` is the fingerprint of the key that the signature names."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a package contains."""

    items: Count
    pictures: Count
    frames: Count
    clips: Count
    missing: tuple[str, ...]
    """Ids of items whose picture is not kept, or damaged."""
    left_out: Count
    """Hits beyond the limit of an export."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """``manifest.json``."""

    schema_version: Literal[1]
    kind: Literal["upperson-evidence"]
    exported: str
    """ISO 8601 with the zone of the server."""
    zone: str
    exported_by: dict[str, str]
    """User and role."""
    about: dict[str, str]
    """Purpose, case and reason, as far as they were given."""
    program: str
    model: dict[str, Any]
    query: dict[str, Any]
    log: dict[str, Any]
    """``chain`` is the last chain of the query log before the export; empty for a new log."""
    blurred: bool
    summary: Summary
    sha256: dict[str, Sha256]
    """Of each file but the manifest and its signature."""
    bytes: dict[str, Count]


@dataclass(frozen=True)
class Difference:
    """What is not as it was written."""

    code: str
    path: str
    """Member of the zip; empty for the package as a whole."""
    text: str


@dataclass(frozen=True, kw_only=True)
class PackageReport:
    """A package, as far as it could be read."""

    sha256: str
    """Of the zip, as the log's line of the export has it."""
    signature: SignatureState
    signed_by: str | None
    """Fingerprint of the key; unless ``trusted`` only what the signature claims."""
    manifest: Manifest | None
    """None if it was not read: the signature is wrong, or it is malformed."""
    problems: list[Difference]


def verify_package(path: Path, trust: Path | None = None) -> PackageReport:
    """Compare a package with its signature and its hashes.

    Without ``trust``, the file of a public key, a signature is not checked.

    Raises:
        InputError: The file or the key cannot be read.
        BackendError: The package cryptography is missing, which a check of a signature needs.
    """
    key = None if trust is None else read_public_key(trust)
    try:
        with path.open("rb") as file:
            return _Check(file, str(path), key).report()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}"
        raise InputError(message, code="package_unreadable", path=path) from error


class _Check:
    """The verification of one package."""

    def __init__(
        self, file: IO[bytes], place: str, key: "ec.EllipticCurvePublicKey | None"
    ) -> None:
        self._file, self._place, self._key = file, place, key
        self._problems: list[Difference] = []

    def report(self) -> PackageReport:
        digest = _digest(self._file)
        manifest: Manifest | None = None
        state: SignatureState = "none"
        signer: str | None = None
        try:
            with zipfile.ZipFile(self._file) as archive:
                members = self._members(archive)
                state, signer, signed = self._signature(archive, members)
                if state != "wrong" and (manifest := self._manifest(archive, members)):
                    self._compare(archive, members, manifest, signed)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError) as error:
            self._add("zip_damaged", "", f"it is no undamaged zip archive: {error}")
        return PackageReport(
            sha256=digest,
            signature=state,
            signed_by=signer,
            manifest=manifest,
            problems=self._problems,
        )

    def _add(self, code: str, path: str, text: str) -> None:
        self._problems.append(Difference(code, path, text))

    def _members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Return the members that may be read, by name."""
        members: dict[str, zipfile.ZipInfo] = {}
        end = 0
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name, mode = info.orig_filename, info.external_attr >> 16
            if not _NAME.fullmatch(name):
                self._add("name_unsafe", name, "a package has no member of such a name")
            elif name in members:
                self._add("member_duplicate", name, "there are two members of this name")
            elif info.flag_bits & 1 or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
                self._add("member_irregular", name, "it is encrypted, or no plain file")
            elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                self._add("member_compressed", name, "it is compressed, expected it as it is")
            else:
                members[name] = info
            if info.header_offset != end and not self._has("bytes_hidden"):
                text = "there are bytes between its members that belong to none"
                self._add("bytes_hidden", name, text)
            end = info.header_offset + _LOCAL_BYTES + len(name) + info.compress_size
        listed = sum(_LISTED_BYTES + len(info.orig_filename) for info in archive.infolist())
        whole = self._file.seek(0, 2)
        if not self._has("bytes_hidden") and (archive.start_dir, whole) != (
            end, end + listed + _END_BYTES,
        ):  # fmt: skip
            self._add("bytes_hidden", "", "there are bytes in it that belong to no member")
        if len(members) > _MOST_MEMBERS:
            raise zipfile.BadZipFile(f"{len(members):,} members, expected {_MOST_MEMBERS:,}")
        return members

    def _has(self, code: str) -> bool:
        return any(problem.code == code for problem in self._problems)

    def _signature(
        self, archive: zipfile.ZipFile, members: Collection[str]
    ) -> tuple[SignatureState, str | None, dict[str, str] | None]:
        """Return the state of the signature, its key, and what is signed."""
        if SIGNATURE not in members:
            if self._key is not None:
                self._add("not_signed", SIGNATURE, "the package is not signed")
            return "none" if self._key is None else "wrong", None, None
        try:
            content = self._read(archive, SIGNATURE, SIGNATURE_BYTES)
            if self._key is None:
                return "not_checked", key_named_in(content, self._place), None
            signed = files_of_signature(content, self._key, self._place)
        except IntegrityError as error:
            self._add(error.code, SIGNATURE, str(error))
            return "wrong", str(error.fields.get("named", "")) or None, None
        return "trusted", key_fingerprint(self._key), signed

    def _manifest(self, archive: zipfile.ZipFile, members: Collection[str]) -> Manifest | None:
        if MANIFEST not in members:
            self._add("member_missing", MANIFEST, "a package has a manifest")
            return None
        try:
            text = self._read(archive, MANIFEST, _MOST_MANIFEST_BYTES).decode("utf-8")
            return read_fields(Manifest, parse_json(text, MANIFEST), MANIFEST)
        except (InputError, UnicodeDecodeError) as error:
            self._add("manifest_malformed", MANIFEST, str(error))
            return None

    def _read(self, archive: zipfile.ZipFile, name: str, most: int) -> bytes:
        if archive.getinfo(name).file_size > most:
            message = f"{name} has more than {most:,} bytes"
            raise IntegrityError(message, code="member_too_large")
        return archive.read(name)

    def _compare(
        self,
        archive: zipfile.ZipFile,
        members: Mapping[str, zipfile.ZipInfo],
        manifest: Manifest,
        signed: Mapping[str, str] | None,
    ) -> None:
        expected = manifest.sha256
        if signed is not None and {n: d for n, d in signed.items() if n != MANIFEST} != expected:
            self._add("manifest_differs", MANIFEST, "it names other files than are signed")
        if expected.keys() != manifest.bytes.keys():
            self._add("manifest_malformed", MANIFEST, "sha256 and bytes name different files")
        own = {MANIFEST, SIGNATURE}
        for name in sorted(members.keys() - expected.keys() - own):
            self._add("member_unexpected", name, "the manifest does not name it")
        for name in sorted(expected.keys() - members.keys()):
            self._add("member_missing", name, "the manifest names it, and it is not there")
        for name in sorted(expected.keys() & members.keys()):
            found = members[name].file_size
            if manifest.bytes.get(name) != found:
                text = f"it has {found:,} bytes, expected {manifest.bytes.get(name, 0):,}"
                self._add("size_differs", name, text)
            elif _digest_of(archive, name) != expected[name]:
                self._add("hash_differs", name, "its content was changed")
        if signed is not None and _digest_of(archive, MANIFEST) != signed.get(MANIFEST):
            self._add("hash_differs", MANIFEST, "it was changed after it was signed")


def check_log(report: PackageReport, log: Path) -> tuple[int | None, list[Difference]]:
    """Find the line of a package's export in a query log; return its number, and differences.

    Raises InputError if the log cannot be read.
    """
    chain = "" if report.manifest is None else str(report.manifest.log.get("chain") or "")
    verified = verify_log(log, [chain] if chain else [])
    problems = [Difference(verified.code, "", text) for text in verified.problems]
    for number, entry in _exports_in(log):
        if entry["details"].get("sha256") == report.sha256:
            by = {} if report.manifest is None else report.manifest.exported_by
            if entry.get("user") != by.get("user"):
                text = f"the log names {safe_repr(entry.get('user'))} as who exported it"
                problems.append(Difference("log_line_differs", "", text))
            return number, problems
    text = f"{log} has no line of this export"
    return None, [*problems, Difference("log_line_missing", "", text)]


def _exports_in(log: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with log.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            is_export = isinstance(entry, dict) and entry.get("action") == "export"
            if is_export and isinstance(entry.get("details"), dict):
                yield number, entry


def _digest_of(archive: zipfile.ZipFile, name: str) -> str | None:
    """Return the SHA-256 of a member; None if it is damaged."""
    try:
        with archive.open(name) as member:
            return _digest(member)
    except zipfile.BadZipFile:
        return None


def _digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()
