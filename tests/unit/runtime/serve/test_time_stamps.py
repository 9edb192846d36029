"""Time stamps of evidence packages and of the query log, by an authority on 127.0.0.1."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import rfc3161_client
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helpers.console import id_of, log_lines, problem
from tests.helpers.invoke import refusal, run_rt
from tests.helpers.refused import refused
from tests.helpers.signing_keys import write_keys
from tests.helpers.small_servers import dripping_server, http_server, no_server, other_server
from tests.helpers.time_stamping import make_authority, stamp, time_stamping
from tests.unit.runtime.serve.test_evidence import files_of, rewritten, with_member, without
from upperson_console.evidence_check import Package, Seal
from upperson_log import timestamps
from upperson_log.timestamps import TimeStampServer, read_certificates, read_stamp
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_signature.signature import read_private_key

HEAD = b"HTTP/1.0 200 OK\r\n\r\n"


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    folder = tmp_path_factory.mktemp("authority")
    write_keys(folder, "site", ec.generate_private_key(ec.SECP256R1()))
    return make_authority(folder)


@pytest.fixture
def export(console, authority, tmp_path):
    """Exports a picture to a file: with what authority, and whether the package is signed."""

    def made(server, is_signed=True):
        key = read_private_key(authority / "site.pem") if is_signed else None
        console.service.seal = Seal(key=key, timestamps=server)
        body = {"ids": [str(id_of(console, "red-0"))]}
        answer = console.client.post("/api/v1/export", json=body)
        file = tmp_path / f"package-{is_signed}.zip"
        file.write_bytes(answer.content)
        return answer, file

    return made


def verified(file, authority, trust=True, root="root"):
    key = authority / "site.pub" if trust else None
    return Package(file, key, authority / f"{root}.cert.pem")


def codes(package):
    return [one.code for one in package.problems]


@pytest.mark.parametrize("is_signed", [True, False])
def test_a_stamp_covers_the_package_and_its_signature(
    console, export, authority, tmp_path, is_signed
):
    with time_stamping(authority) as (url, requests):
        root = authority / "root.cert.pem"
        _, file = export(TimeStampServer(url, read_certificates(root)), is_signed)
    package = verified(file, authority, is_signed)
    assert (package.problems, package.stamp_state) == ([], "trusted")
    assert package.stamp.authority == "CN=tsa"
    logged = log_lines(console)[-1]["details"]["timestamp"]
    assert logged == {"time": package.stamp.time, "authority": "CN=tsa"}
    assert package.facts["timestamp_by"] == "127.0.0.1"
    # Nothing but a hash is sent.
    assert (len(requests), len(requests[0]) < 100) == (1, True)
    # Others verify it, too.
    members, stamped = files_of(file), tmp_path / "stamped"
    (tmp_path / "manifest.tsr").write_bytes(members["manifest.tsr"])
    stamped.write_bytes(members["manifest.json"] + members.get("manifest.sig", b""))
    command = ["openssl", "ts", "-verify", "-data", stamped, "-in", tmp_path / "manifest.tsr",
               "-CAfile", root]  # fmt: skip
    assert subprocess.run(command, capture_output=True).returncode == 0
    command = ("evidence", "verify", file, "--tsa-cert", root, "--json")
    found = json.loads(run_rt(*command).stdout)["timestamp"]
    assert (found["state"], found["authority"]) == ("trusted", "CN=tsa")


def test_what_is_wrong_with_a_stamp_is_found(export, authority, tmp_path, monkeypatch):
    with time_stamping(authority) as (url, _):
        _, file = export(TimeStampServer(url))
        other = make_authority(tmp_path / "other")
    unchecked = Package(file)
    assert (unchecked.problems, unchecked.stamp_state) == ([], "not_checked")
    assert codes(verified(file, authority, root="tsa")) == ["timestamp_wrong"], "no root"
    assert codes(Package(file, None, other / "root.cert.pem")) == ["timestamp_wrong"]

    for name, code in (("tsr", "not_stamped"), ("sig", "timestamp_wrong")):
        changed = rewritten(file, without(f"manifest.{name}"))
        assert codes(verified(changed, authority, trust=name == "tsr")) == [code]
    with refused("certificate_unreadable", InputError):
        Package(file, None, authority / "site.pem")
    for content in (b"", b"\x30\x03\x02\x01\x00", bytes(300_000)):
        changed = rewritten(file, with_member("manifest.tsr", content))
        package = verified(changed, authority)
        assert codes(package)[0] in ("timestamp_wrong", "member_too_large")
        assert package.stamp_state == "wrong"
        assert codes(Package(changed))[0] in ("timestamp_wrong", "member_too_large")
        with monkeypatch.context() as without_package:
            without_package.setitem(sys.modules, "rfc3161_client", None)
            assert codes(Package(changed))[0] in ("timestamp_wrong", "member_too_large")
            assert codes(Package(file)) == []
    another = files_of(file)["manifest.tsr"]
    _, plain = export(None)
    assert codes(verified(plain, authority)) == ["not_stamped"]
    assert Package(plain, authority / "site.pub").problems == []
    for content in (b"", another):
        added = rewritten(plain, with_member("manifest.tsr", content))
        for package in (Package(added, authority / "site.pub"), verified(added, authority)):
            assert (codes(package), package.stamp_state) == (["member_unexpected"], "wrong")


@pytest.mark.parametrize("kind", ["away", "slow", "garbage", "status", "long"])
def test_an_authority_that_fails_costs_the_stamp_alone(
    console, export, authority, monkeypatch, kind
):
    monkeypatch.setattr(timestamps, "_LONGEST_S", 0.5 if kind == "slow" else 20.0)
    servers = {
        "away": no_server,
        "slow": lambda: dripping_server(HEAD),
        "garbage": lambda: other_server(HEAD + b"nothing"),
        "status": lambda: http_server(500),
        "long": lambda: other_server(HEAD + bytes(300_000)),
    }
    with servers[kind]() as port:
        port = port if isinstance(port, int) else port[0]
        server = TimeStampServer(f"http://127.0.0.1:{port}/")
        begin = time.monotonic()
        _, file = export(server)
        assert time.monotonic() - begin < 15, "a slow one goes on for 20 s"
        package = Package(file, authority / "site.pub")
        assert (package.problems, package.stamp_state) == ([], "none")
        missing = package.facts["timestamp_missing"]
        assert b"no time stamp of 127.0.0.1" in files_of(file)["index.html"]
        assert log_lines(console)[-1]["details"]["timestamp_missing"] == missing
        lines = len(log_lines(console))
        answer, _ = export(replace(server, is_required=True))
        problem(answer, 503, "timestamp_unavailable")
        assert not [line for line in log_lines(console)[lines:] if line["action"] == "export"]


def test_a_malformed_answer_or_one_to_another_request_is_refused(authority):
    with time_stamping(authority) as (url, _):
        answer, _ = TimeStampServer(url).stamp(b"one")
    nonce = rfc3161_client.decode_timestamp_response(answer).tst_info.nonce
    trusted = read_certificates(authority / "root.cert.pem")
    assert read_stamp(answer, b"one", trusted, nonce).authority == "CN=tsa"
    for content, number in ((b"two", nonce), (b"one", nonce + 1)):
        with refused("timestamp_wrong", IntegrityError):
            read_stamp(answer, content, trusted, number)
    # Its version is 8: cryptography raises InvalidVersion, which is no ValueError.
    request = rfc3161_client.TimestampRequestBuilder().data(b"one").build()
    made = stamp(authority, request.as_bytes())
    version = b"\xa0\x03\x02\x01"
    assert made.count(version + b"\x02") == 1
    malformed = made.replace(version + b"\x02", version + b"\x07")
    for known in ((), trusted):
        with refused("timestamp_wrong", IntegrityError):
            read_stamp(malformed, b"one", known)
    unavailable = refused("timestamp_unavailable", BackendError)
    with other_server(HEAD + malformed) as port, unavailable:
        TimeStampServer(f"http://127.0.0.1:{port}/").stamp(b"one")


def test_an_address_that_cannot_be_used_or_a_missing_package_is_refused(monkeypatch, authority):
    for url in ("tsa.example", "ftp://a/b", "http://", "http://a:x/", "http://u:p@a/"):
        refusal(run_rt("log", "timestamp", "x.log", "--url", url, "--json"), 2, "address_malformed")
    monkeypatch.setitem(sys.modules, "rfc3161_client", None)
    for call in (lambda: TimeStampServer("http://a/"), lambda: read_certificates(authority)):
        with refused("extra_missing", BackendError):
            call()


def test_the_chain_of_a_log_is_stamped_and_verified(console, authority, tmp_path):
    console.client.search(sentence="red")
    root = authority / "root.cert.pem"
    with time_stamping(authority) as (url, requests):
        command = ("log", "timestamp", console.log, "--url", url, "--json")
        first = json.loads(run_rt(*command, "--tsa-cert", root).stdout)
        again = json.loads(run_rt(*command).stdout)
        assert (first["new"], again["new"], len(requests)) == (True, False, 1)
        assert (again["file"], again["time"]) == (first["file"], first["time"])
        console.client.search(sentence="blue")
        second = json.loads(run_rt(*command).stdout)
        # A file of that name that is no stamp of this chain is none.
        place = Path(second["file"])
        stamped = place.read_bytes()
        for content in (b"", Path(first["file"]).read_bytes()):
            place.write_bytes(content)
            refusal(run_rt(*command), 6, "timestamp_wrong")
            assert place.read_bytes() == content
        place.write_bytes(stamped)
        another = ("--tsa-cert", make_authority(tmp_path / "another") / "root.cert.pem")
        refusal(run_rt(*command, *another), 6, "timestamp_wrong")
    assert (first["lines"], second["lines"], second["authority"]) == (1, 2, "CN=tsa")
    chosen = [word for one in (first, second) for word in ("--timestamp", one["file"])]
    verify = ("log", "verify", console.log, *chosen)
    found = json.loads(run_rt(*verify, "--tsa-cert", root, "--json").stdout)
    assert (found["ok"], [one["line"] for one in found["timestamps"]]) == (True, [1, 2])
    refusal(run_rt(*verify, "--json"), 2, "tsa_cert_missing")
    refusal(run_rt(*verify, *another, "--json"), 6, "timestamp_wrong")
    renamed = Path(first["file"]).rename(tmp_path / "stamp.tsr")
    one = ("log", "verify", console.log, "--timestamp", renamed, "--tsa-cert", root, "--json")
    refusal(run_rt(*one), 6, "timestamp_wrong")
    # A log that was written anew has no line of the stamp.
    renamed.rename(first["file"])
    (tmp_path / "new.log").write_bytes(b"")
    anew = ("log", "verify", tmp_path / "new.log", *verify[3:], "--tsa-cert", root)
    assert run_rt(*anew).exit_code == 6
    # Nothing is stamped that is wrong already.
    console.log.write_bytes(console.log.read_bytes().replace(b"red", b"tan"))
    refusal(run_rt(*command), 6, "log_altered")
