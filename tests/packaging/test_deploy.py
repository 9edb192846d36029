"""The files to deploy with: what they run is what the command line takes."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from tests.helpers.command_line import ROOT
from tests.packaging.test_docs import complaint

DEPLOY = ROOT / "deploy"
DOCKERFILES = ["Dockerfile", "Dockerfile.jetson"]
INSTRUCTIONS = {
    "FROM", "ARG", "WORKDIR", "COPY", "RUN", "USER", "ENV", "VOLUME", "EXPOSE", "HEALTHCHECK",
    "ENTRYPOINT", "CMD",
}  # fmt: skip


def instructions(name):
    text = re.sub(r"^#.*\n", "", (DEPLOY / name).read_text(), flags=re.MULTILINE)
    return [line.split(maxsplit=1) for line in text.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_run_as_a_user_of_their_own_and_what_they_run_parses(name):
    found = instructions(name)
    assert {word for word, _ in found} <= INSTRUCTIONS
    assert [rest for word, rest in found if word == "USER"] == ["upperson"]
    last = dict(found)
    assert json.loads(last["ENTRYPOINT"]) == ["upperson-rt"]
    command = json.loads(last["CMD"])
    assert complaint("upperson-rt", *command) == ""
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert "--token-file" in command
    for word, rest in found:
        if word == "COPY" and "--from" not in rest:
            assert all((ROOT / source).exists() for source in rest.split()[:-1])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images_fetch_nothing_without_a_hash(name):
    """Our own source is built and installed without fetching anything; all else is locked."""
    commands = [rest for word, rest in instructions(name) if word == "RUN"]
    calls = [
        c for line in commands for c in line.split("&&") if re.search("pip (install|wheel)", c)
    ]
    assert len(calls) >= 3
    for call in calls:
        own = {"./runtime": {"--no-deps", "--no-build-isolation"}, "dist/*.whl": {"--no-deps"}}
        assert own.get(call.split()[-1], {"--require-hashes", "-r"}) <= set(call.split()), call
    (source,) = [rest.split()[:-1] for word, rest in instructions(name) if "edge.txt ./" in rest]
    assert source == ["deploy/requirements-build.txt", "deploy/requirements-edge.txt"]


def test_a_build_gets_the_files_that_the_images_copy_and_no_others():
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    first, *rest = [line for line in lines if not line.startswith("#")]
    assert first == "*"
    copied = {
        source
        for name in DOCKERFILES
        for word, copy in instructions(name)
        if word == "COPY" and "--from" not in copy
        for source in copy.split()[:-1]
    }
    assert {line[1:] for line in rest if line.startswith("!")} == copied


def test_the_composition_runs_what_parses():
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert services.keys() == {"milvus", "watch", "console"}
    for name in ("watch", "console"):
        assert complaint("upperson-rt", *services[name]["command"]) == ""
        assert services[name]["read_only"] is True
        assert (
            DEPLOY / services[name]["build"]["context"] / services[name]["build"]["dockerfile"]
        ).exists()
    assert services["console"]["ports"] == ["127.0.0.1:8480:8480"]


def test_each_service_of_the_composition_has_a_health_check_of_what_it_does(tmp_path):
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    image = dict(instructions("Dockerfile"))
    assert "127.0.0.1:8480/" in image["HEALTHCHECK"]
    assert "healthcheck" not in services["console"], "it has the image's"
    assert "--port" not in services["console"]["command"], "the image's asks the default port"
    command = services["watch"]["command"]
    file = command[command.index("--metrics-file") + 1]
    kind, program, *words = services["watch"]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    metrics = tmp_path / "watch.prom"
    assert file in words[-1]
    check = [sys.executable, *words[:-1], words[-1].replace(file, str(metrics))]

    def code():
        return subprocess.run(check, stderr=subprocess.DEVNULL, check=False).returncode

    assert code() == 1
    metrics.touch()
    assert code() == 0
    os.utime(metrics, (1e9, 1e9))
    assert code() == 1


def test_the_units_run_what_parses_and_are_hardened_alike():
    prune = (DEPLOY / "upperson-prune.service").read_text()
    commands = re.findall(r"^ExecStart=/opt/upperson/bin/(.*)$", prune, re.MULTILINE)
    assert [complaint(*command.split()) for command in commands] == ["", ""]
    rest = {}
    for name in ("console", "watch"):
        text = (DEPLOY / f"upperson-{name}.service").read_text()
        program, *words = re.search(r"^ExecStart=(.+)$", text, re.MULTILINE)[1].split()
        assert program.endswith("/upperson-rt")
        assert complaint("upperson-rt", *words) == ""
        for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "User=upperson", "UMask=0077"):
            assert f"\n{line}\n" in text
        rest[name] = text.partition("MemoryMax=")[2].splitlines()
    assert [line for line in rest["watch"] if not line.startswith("#")] == rest["console"]
