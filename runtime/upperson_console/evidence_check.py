"""The format of an evidence package, and its verification, which needs neither server nor network.

A time stamp covers manifest and signature, so that both existed by then; it lies beside them. The
manifest, which is signed before, names the authority: a stamp that was removed shows.

A package may come from anyone: its members are read within limits and never unpacked. Beside the
contents every byte of the zip is compared with what `evidence` writes. Packages of version 1, of
earlier releases, have dates, an order and a form of the signature that nothing in them states.
"""

import errno
import hashlib
import json
import re
import stat
import struct
import zipfile
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
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
    is_as_signed,
    key_fingerprint,
    key_named_in,
    read_public_key,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import Certificate

    from upperson_log.timestamps import TimeStampServer

KIND, VERSION = "upperson-evidence", 2
_VERSIONS = (1, VERSION)
MANIFEST, SIGNATURE, STAMP = "manifest.json", "manifest.sig", "manifest.tsr"
_MOST_MEMBERS = 20_000
_MOST_MANIFEST_BYTES = 16 << 20
_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 64 << 20
_NAME = re.compile(r"(?:(?:pictures|frames|clips)/)?[a-z0-9]+\.[a-z0-9]{1,8}")
_MOST_LISTED_BYTES = 128 * _MOST_MEMBERS
"""Of the list of members: it is in memory before the members are counted."""
_END_BYTES, _ZIP64_BYTES = 22, 20
"""At the end of a zip, and before that of one that is larger than a package can be."""
DATE = (1980, 1, 1, 0, 0, 0)
"""Of each member; a package states its time in its facts."""
SYSTEM, _FORMAT, _MODE = 3, 20, 0o600 << 16
"""What a zip says of each member: made on Unix, by version 2.0 of the format, access mode."""
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
        self._is_as_signed = True
        self._is_exact = False
        """Whether the package states its order and has fixed dates: from version 2 on."""
        self._order: list[str] = []
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
                members = self._members(archive)
                signed = self._signed(archive, members.keys())
                if self.signature == "wrong":
                    return
                if MANIFEST in members:
                    self._compare(archive, members.keys(), signed)
                    self._read_stamp(archive, members.keys())
                    self._compare_container(file, [*members.values()])
                else:
                    self._add("member_missing", MANIFEST, "a package has a manifest")
        except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as why:
            self._add("zip_damaged", "", f"it is no undamaged zip archive: {why}")

    def _members(self, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
        """Return the members that may be read, by name, as they lie in the file."""
        members: dict[str, zipfile.ZipInfo] = {}
        if len(archive.filelist) > _MOST_MEMBERS:
            raise zipfile.BadZipFile(f"it has more than {_MOST_MEMBERS:,} members")
        if any(info.header_offset < 0 for info in archive.filelist):
            raise zipfile.BadZipFile("a member begins before the file")
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
        return members

    def _compare_container(self, file: IO[bytes], members: list[zipfile.ZipInfo]) -> None:
        """Compare what stands before, between and after the contents with what is written."""
        if self._is_exact:
            places = {name: place for place, name in enumerate(self._order)}
            members.sort(key=lambda info: places.get(info.orig_filename, len(places)))
        end, listed = 0, []
        for info in members:
            local, entry = _headers(info, end, self._is_exact)
            file.seek(end)
            if file.read(len(local)) != local:
                text = "its header is not as it was written: other programs may read it otherwise"
                self._add("member_differs", info.orig_filename, text)
            listed.append(entry)
            end += len(local) + info.file_size
        count, size = len(listed), sum(map(len, listed))
        listed.append(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, size, end, 0))
        file.seek(end)
        if file.read(size + _END_BYTES + 1) != b"".join(listed):
            text = "its list of members was changed, or there are bytes that belong to no member"
            self._add("bytes_hidden", "", text)

    def _signed(self, archive: zipfile.ZipFile, names: Collection[str]) -> dict[str, str] | None:
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
            self._is_as_signed = is_as_signed(content, self._key, self._place)
            return signed
        except IntegrityError as error:
            self.signature = "wrong"
            self._add(error.code, SIGNATURE, str(error))
            return None

    def _compare(
        self, archive: zipfile.ZipFile, names: AbstractSet[str], signed: Mapping[str, str] | None
    ) -> None:
        try:
            text = _read(archive, MANIFEST, _MOST_MANIFEST_BYTES)
            facts = parse_json(text.decode("utf-8"), MANIFEST)
            if not isinstance(facts, dict) or facts.get("kind") != KIND:
                raise InputError(f"{MANIFEST} is none of an evidence package")
            if facts["schema_version"] not in _VERSIONS:
                raise InputError(f"{MANIFEST} is of another version: use a newer program")
            expected = read_fields(_Hashes, {"sha256": facts.pop("sha256")}, MANIFEST).sha256
        except (InputError, IntegrityError, UnicodeDecodeError, KeyError) as error:
            self._add("manifest_malformed", MANIFEST, str(error))
            return
        self.facts = facts
        self._is_exact = facts["schema_version"] > 1
        self._order = [*expected, MANIFEST, SIGNATURE, STAMP]
        if self._is_exact and not self._is_as_signed:
            self._add("signature_differs", SIGNATURE, "it is not written as the key's owner did")
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

    def _read_stamp(self, archive: zipfile.ZipFile, names: Collection[str]) -> None:
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


def _headers(info: zipfile.ZipInfo, place: int, is_exact: bool) -> tuple[bytes, bytes]:
    """Return what stands before a member at a place, and its entry in the list of members.

    Unless ``is_exact``, date and system are those that the list says.
    """
    name, size = info.orig_filename.encode(), info.file_size
    year, month, day, hour, minute, second = DATE if is_exact else info.date_time
    date, time = (year - 1980) << 9 | month << 5 | day, hour << 11 | minute << 5 | second // 2
    system = SYSTEM if is_exact else info.create_system
    same = struct.pack(
        "<5H3L2H", _FORMAT, 0, zipfile.ZIP_STORED, time, date, info.CRC, size, size, len(name), 0
    )
    listed = struct.pack("<4sBB", b"PK\1\2", _FORMAT, system) + same
    return b"PK\3\4" + same + name, listed + struct.pack("<3H2L", 0, 0, 0, _MODE, place) + name


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
