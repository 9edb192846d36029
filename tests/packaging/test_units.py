"""The programs of deploy/*.service run under the filters that systemd makes of those files."""

import json
import signal
import urllib.request

import pytest

from tests.helpers.command_line import ROOT, start_program
from tests.helpers.served import served
from tests.helpers.toy_bundle import make_toy_bundle
from tests.helpers.unit_filter import allowed_calls, reason_to_skip, settings_of, under
from upperson_synthetic.video import VideoSpec, write_video

UNITS = {name: ROOT / "deploy" / f"upperson-{name}.service" for name in ("watch", "console")}

needs_seccomp = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with ./bundle and ./street.avi."""
    folder = tmp_path_factory.mktemp("units")
    make_toy_bundle(folder / "bundle")
    write_video(folder / "street.avi", VideoSpec(people=2, seconds=3, fps=8, seed=5))
    return folder


def watch(folder, unit, tmp_path):
    """Watch the film to its end under a unit's filters; return the exit code and what it wrote."""
    output = tmp_path / "watch.json"
    film = ("street.avi", "--detector", "street.json", "--start", "1800000000", "--camera", "gate")
    place = ("-b", "bundle", "-g", tmp_path / "gallery", "--metrics-file", tmp_path / "watch.prom")
    options = {"cwd": folder, "output": output, "within": under(unit)}
    process = start_program(
        "upperson-rt", "watch", *film, *place, "--json", "--log-json", **options
    )
    code = process.wait(120)
    return code, output.read_text(), output.with_name("watch.json.err").read_text()


@needs_seccomp
def test_a_film_is_watched_and_the_console_is_ready_under_the_filters(folder, tmp_path):
    code, output, errors = watch(folder, UNITS["watch"], tmp_path)
    assert code == 0, errors
    assert "not permitted" not in errors
    camera = json.loads(output)["cameras"]["gate"]
    assert camera["state"] == "ended"
    assert camera["committed"] == camera["accepted"] > 0
    assert "upperson_committed_total" in (tmp_path / "watch.prom").read_text()
    place = ("-b", folder / "bundle", "-g", tmp_path / "gallery", "--state", tmp_path / "console")
    with (
        served(tmp_path, *place, within=under(UNITS["console"])) as console,
        urllib.request.urlopen(f"{console.url}/api/v1/ready", timeout=60) as answer,
    ):
        assert answer.status == 200


@needs_seccomp
def test_a_unit_that_kills_for_a_refused_call_fails(folder, tmp_path):
    """numpy asks for a NUMA policy (mbind, in @resources), and takes no for an answer."""
    text = UNITS["watch"].read_text()
    line = "SystemCallErrorNumber=EPERM\n"
    assert line in text
    unit = tmp_path / "kills.service"
    unit.write_text(text.replace(line, ""))
    code, output, errors = watch(folder, unit, tmp_path)
    assert (code, output) == (-signal.SIGSYS, ""), errors


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS.keys())
def test_the_filter_allows_what_a_service_needs_and_refuses_privileges(unit):
    allowed = allowed_calls(unit)
    assert {"execve", "futex", "openat", "socket", "clone3", "mmap", "prlimit64"} <= allowed
    assert not {"mbind", "setuid", "mount", "ptrace", "bpf", "init_module", "chroot"} & allowed
    names = {name for name, _ in settings_of(unit)}
    # OpenVINO makes code at run time.
    assert "MemoryDenyWriteExecute" not in names
