"""The format of an evidence package, and its verification, which needs neither server nor network.

A time stamp covers manifest and signature, so that both existed by then; it lies beside them. The
manifest, which is signed before, names the authority: a stamp that was removed shows.

A package may come from anyone: its members are read within limits and never unpacked.
"""

import errno
import hashlib
import json
import re
import stat
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

from upperson_log.chain import open_log, verify_log
from upperson_log.timestamps import (
    MOST_STAMP_BYTES,
    TimeStamp,
    check_form,
    read_certificates,
    read_stamp,
)
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import Sha256, parse_json, read_fields
from upperson_signature.signature import (
    SIGNATURE_BYTES,
    files_of_signature,
    key_fingerprint,
    key_named_in,
    read_public_key,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import Certificate

    from upperson_log.timestamps import TimeStampServer

KIND, VERSION = "upperson-evidence", 1
MANIFEST, SIGNATURE, STAMP = "manifest.json", "manifest.sig", "manifest.tsr"
_MOST_MEMBERS = 20_000
_MOST_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 64 << 20
_NAME = re.compile(r"(?:(?:pictures|frames|clips)/)?[a-z0-9]+\.[a-z0-9]{1,8}")
_MOST_LISTED_BYTES = 128 * _MOST_MEMBERS
"""Of the list of members: it is in memory before the members are counted."""
_LOCAL_BYTES, _LISTED_BYTES, _END_BYTES, _ZIP64_BYTES = 30, 46, 22, 20
"""Of a zip beside names and contents: for a member, in the list of members, and at the end. The
last stand before the end of a zip that is larger than a package can be."""
SignatureState: TypeAlias = Literal["trusted", "not_checked", "none", "wrong"]
"""Of a signature or a time stamp."""


@dataclass(frozen=True, kw_only=True)
class Seal:
    """Who signs and stamps the packages of a server, and whose signature its bundle has."""

    key: "ec.EllipticCurvePrivateKey | None" = None
    bundle: Mapping[str, Any] = field(
        default_factory=lambda: {"signed_by": None, "verified": False}
    )
    """``signed_by`` is the fingerprint of the key that the signature names."""
    timestamps: "TimeStampServer | None" = None


@dataclass(frozen=True)
class Difference:
    """What is not as it was written; ``path`` is a member of the zip, or empty for all of it."""

    code: str
    path: str
    text: str


@dataclass(frozen=True, kw_only=True)
class _Hashes:
    sha256: dict[str, Sha256]
    """Of each file but the manifest and its signature."""


class Package:
    """What a package says, compared with its hashes and its signature."""

    def __init__(self, path: Path, trust: Path | None = None, tsa_cert: Path | None = None) -> None:
        """Verify a package; ``trust`` is the file of the public key that must have signed it.

        ``tsa_cert`` is that of the certificates of an authority that must have stamped it.

        Raises:
            InputError: The file, the key or the certificates cannot be read.
        """
        self.unavailable: BackendError | None = None
        """What kept the signature or the time stamp from being checked: a missing package."""
        self._has_trust, self._has_authority = trust is not None, tsa_cert is not None
        self._key: ec.EllipticCurvePublicKey | None = None
        self._authority: list[Certificate] | None = None
        try:
            self._authority = None if tsa_cert is None else read_certificates(tsa_cert)
        except BackendError as error:
            self.unavailable = error
        try:
            self._key = None if trust is None else read_public_key(trust)
        except BackendError as error:
            self.unavailable = error
        self._place = str(path)
        self.problems: list[Difference] = []
        self.signature: SignatureState = "none"
        self.signed_by: str | None = None
        """Fingerprint of the key; unless it is trusted, what the signature claims."""
        self.stamp_state: SignatureState = "none"
        self.stamp: TimeStamp | None = None
        """A trusted time stamp."""
        self.facts: dict[str, Any] = {}
        """Who exported what, and when; empty if the signature is wrong, as nothing is read then."""
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # A pipe or a device may have no end.
                raise OSError(errno.EINVAL, "not a regular file")
            with path.open("rb") as file:
                self.sha256 = digest_of(file)
                """Of the zip; the log's line of the export has it."""
                self._verify(file)
        except OSError as error:
            message = f"cannot read {path}: {error.strerror}"
            raise InputError(message, code="package_unreadable", path=path) from error

    def find_in(self, log: Path) -> int | None:
        """Return the number of the export's line in a query log; add what differs to `problems`.

        Raises InputError if the log cannot be read.
        """
        chain = str(self.facts.get("log_chain") or "")
        report = verify_log(log, [chain] if chain else [])
        for text in report.problems:
            self._add(report.code, "", text)
        number = 0
        with open_log(log) as files:
            for file, _ in files.opened():
                while line := file.readline(_LONGEST_LINE):
                    number += 1
                    if self.sha256.encode() in line and self._is_export(line):
                        return number
        self._add("log_line_missing", "", f"{log} has no line of this export")
        return None

    def _is_export(self, line: bytes) -> bool:
        try:
            entry = json.loads(line)
            found = entry["action"] == "export" and entry["details"]["sha256"] == self.sha256
            user = entry["user"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return False
        if found and self.facts and user != self.facts.get("user"):
            text = f"the log names {safe_repr(user)} as who exported it"
            self._add("log_line_differs", "", text)
        return bool(found)

    def _add(self, code: str, path: str, text: str) -> None:
        self.problems.append(Difference(code, path, text))

    def _verify(self, file: IO[bytes]) -> None:
        try:
            size = file.seek(0, 2)
            file.seek(max(0, size - _END_BYTES - _ZIP64_BYTES))
            end = file.read()
            if not end[-_END_BYTES:].startswith(b"PK\5\6") or end.startswith(b"PK\6\7"):
                raise zipfile.BadZipFile("it does not end as a package does")
            if int.from_bytes(end[-10:-6], "little") > _MOST_LISTED_BYTES:
                raise zipfile.BadZipFile(f"it has more than {_MOST_MEMBERS:,} members")
            with zipfile.ZipFile(file) as archive:
                names = self._members(archive, file, size)
                signed = self._signed(archive, names)
                if self.signature == "wrong":
                    return
                if MANIFEST in names:
                    self._compare(archive, names, signed)
                    self._read_stamp(archive, names)
                else:
                    self._add("member_missing", MANIFEST, "a package has a manifest")
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as why:
            self._add("zip_damaged", "", f"it is no undamaged zip archive: {why}")

    def _members(self, archive: zipfile.ZipFile, file: IO[bytes], size: int) -> set[str]:
        """Return the members that may be read, and look at the container itself."""
        names: set[str] = set()
        end = listed = gaps = 0
        if len(archive.filelist) > _MOST_MEMBERS:
            raise zipfile.BadZipFile(f"it has more than {_MOST_MEMBERS:,} members")
        if any(info.header_offset < 0 for info in archive.filelist):
            raise zipfile.BadZipFile("a member begins before the file")
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name, mode = info.orig_filename, info.external_attr >> 16
            if not _NAME.fullmatch(name):
                self._add("name_unsafe", name, "a package has no member of such a name")
            elif name in names:
                self._add("member_duplicate", name, "there are two members of this name")
            elif info.flag_bits & 1 or (stat.S_IFMT(mode) and not stat.S_ISREG(mode)):
                self._add("member_irregular", name, "it is encrypted, or no plain file")
            elif info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                self._add("member_compressed", name, "it is compressed, expected it as it is")
            else:
                names.add(name)
                if not _is_as_listed(file, info):
                    self._add("member_differs", name, "other programs may read another content")
            gaps += info.header_offset != end
            end = info.header_offset + _LOCAL_BYTES + len(name) + info.compress_size
            listed += _LISTED_BYTES + len(name)
        if gaps or (archive.start_dir, size) != (end, end + listed + _END_BYTES):
            self._add("bytes_hidden", "", "there are bytes in it that belong to no member")
        return names

    def _signed(self, archive: zipfile.ZipFile, names: set[str]) -> dict[str, str] | None:
        """Return what is signed by the trusted key, and set the state of the signature."""
        if SIGNATURE not in names:
            if self._has_trust:
                self.signature = "wrong"
                self._add("not_signed", SIGNATURE, "the package is not signed")
            return None
        try:
            content = _read(archive, SIGNATURE, SIGNATURE_BYTES)
            self.signed_by = key_named_in(content, self._place)
            self.signature = "not_checked" if self._key is None else "trusted"
            if self._key is None:
                return None
            signed = files_of_signature(content, self._key, self._place)
            self.signed_by = key_fingerprint(self._key)
            return signed
        except IntegrityError as error:
            self.signature = "wrong"
            self._add(error.code, SIGNATURE, str(error))
            return None

    def _compare(
        self, archive: zipfile.ZipFile, names: set[str], signed: Mapping[str, str] | None
    ) -> None:
        try:
            text = _read(archive, MANIFEST, _MOST_MANIFEST_BYTES)
            facts = parse_json(text.decode("utf-8"), MANIFEST)
            if not isinstance(facts, dict) or facts.get("kind") != KIND:
                raise InputError(f"{MANIFEST} is none of an evidence package")
            if facts["schema_version"] != VERSION:
                raise InputError(f"{MANIFEST} is of another version: use a newer program")
            expected = read_fields(_Hashes, {"sha256": facts.pop("sha256")}, MANIFEST).sha256
        except (InputError, IntegrityError, UnicodeDecodeError, KeyError) as error:
            self._add("manifest_malformed", MANIFEST, str(error))
            return
        self.facts = facts
        expected = {**expected, MANIFEST: hashlib.sha256(text).hexdigest()}
        if signed is not None and signed != expected:
            self._add("manifest_differs", MANIFEST, "it differs from what was signed")
        stamps = {STAMP} if "timestamp_by" in facts else set()
        for name in sorted(names - expected.keys() - {SIGNATURE} - stamps):
            self._add("member_unexpected", name, "the manifest does not name it")
        for name in sorted(expected.keys() - names):
            self._add("member_missing", name, "the manifest names it, and it is not there")
        for name in sorted(expected.keys() & names):
            with archive.open(name) as member:
                if digest_of(member) != expected[name]:
                    self._add("hash_differs", name, "its content was changed")

    def _read_stamp(self, archive: zipfile.ZipFile, names: set[str]) -> None:
        if STAMP in names and self.facts and "timestamp_by" not in self.facts:
            self.stamp_state = "wrong"  # An unexpected member.
        elif STAMP in names:
            limits = {MANIFEST: _MOST_MANIFEST_BYTES, SIGNATURE: SIGNATURE_BYTES}
            try:
                parts = {n: _read(archive, n, most) for n, most in limits.items() if n in names}
                answer, content = _read(archive, STAMP, MOST_STAMP_BYTES), stamped_content(parts)
                if self._authority is None:
                    check_form(answer, content)
                    self.stamp_state = "not_checked"
                else:
                    self.stamp = read_stamp(answer, content, self._authority)
                    self.stamp_state = "trusted"
            except IntegrityError as error:
                self.stamp_state = "wrong"
                self._add(error.code, STAMP, str(error))
        elif self._has_authority or "timestamp_by" in self.facts:
            self._add("not_stamped", STAMP, "the package has no time stamp")


def stamped_content(members: Mapping[str, bytes]) -> bytes:
    """Return what a time stamp covers: the manifest, then the signature, if there is one."""
    return members[MANIFEST] + members.get(SIGNATURE, b"")


def _is_as_listed(file: IO[bytes], info: zipfile.ZipInfo) -> bool:
    """Return whether the header before a stored member says what the list of members says."""
    name, size = info.orig_filename.encode(), info.file_size
    file.seek(info.header_offset)
    head = file.read(_LOCAL_BYTES + len(name))
    how = struct.pack("<HH", info.flag_bits, zipfile.ZIP_STORED)
    what = struct.pack("<LLLHH", info.CRC, size, size, len(name), 0)
    return (head[6:10], head[14:]) == (how, what + name)


def _read(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    if archive.getinfo(name).file_size > most:
        raise IntegrityError(f"{name} has more than {most:,} bytes", code="member_too_large")
    return archive.read(name)


def digest_of(file: IO[bytes]) -> str:
    """Return the SHA-256 of a file from its place on; empty for a damaged member of a zip."""
    digest = hashlib.sha256()
    try:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    except zipfile.BadZipFile:  # The zip's own checksum of a member is wrong.
        return ""
    return digest.hexdigest()
