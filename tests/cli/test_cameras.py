"""``upperson-rt cameras`` as users run it, with devices of our own making and of others'."""

import json
import os
import signal
from contextlib import suppress

import pytest

from tests.helpers import onvif_simulator, rtsp_camera
from tests.helpers.command_line import start_program
from tests.helpers.fake_camera import wait_for
from tests.helpers.invoke import refusal, run_rt
from tests.helpers.onvif_device import onvif_device
from tests.helpers.small_servers import no_server
from tests.helpers.toy_bundle import make_toy_bundle

USER, PASSWORD = "anna", "s:e/c#ret1"


@pytest.fixture
def logins(work):
    path = work / "cameras.netrc"
    path.write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    path.chmod(0o600)
    return path


def run(*arguments):
    return run_rt("cameras", *arguments)


def test_streams_are_listed_as_watch_takes_them(logins, monkeypatch):
    streams = {"main": "rtsp://127.0.0.1:8554/main", "sub": "rtsp://127.0.0.1:8554/sub?a=1&b=2"}
    with onvif_device(login=(USER, PASSWORD), streams=streams) as device:
        place = f"127.0.0.1:{device.port}"
        table = run(place, "--netrc", logins)
        assert table.exit_code == 0, table.stderr
        lines = [" ".join(line.split()) for line in table.stdout.splitlines()]
        assert lines == [
            "camera stream pixels kind frames/s source",
            "Maker & Sons Cam 5 main 640x360 H264 25 Cam-5=rtsp://127.0.0.1:8554/main",
            "Maker & Sons Cam 5 sub 1280x720 H264 25 'Cam-5=rtsp://127.0.0.1:8554/sub?a=1&b=2'",
        ]
        with no_server() as port:
            half = run(place, f"127.0.0.1:{port}", "--netrc", logins)
        assert (half.exit_code, half.stdout) == (3, table.stdout)
        assert "1 of 2 cameras" in half.stderr
        missing = run(place, "--json")
        assert (missing.exit_code, '"credentials_missing"' in missing.stdout) == (3, True)
        monkeypatch.setenv("UPPERSON_NETRC", str(logins))
        listed = run(place, "--json")
        assert listed.exit_code == 0, listed.stderr
        (camera,) = json.loads(listed.stdout)["cameras"]
        assert [stream["address"] for stream in camera["streams"]] == list(streams.values())
        assert PASSWORD not in table.output + listed.output


def test_what_is_refused(work):
    for exit_code, code, *arguments in (
        (2, "no_camera_named"),
        (2, "interface_without_search", "10.0.0.5", "--interface", "127.0.0.1"),
        (2, None, "--search", "--timeout", "3600"),
        (3, "network_unreachable", "--search", "--interface", "10.255.255.1"),
        (2, "interface_malformed", "--search", "--interface", "999.1.1.1"),
        (2, "device_malformed", "rtsp://10.0.0.5/x"),
        (3, None, "10.0.0.5", "--netrc", "none"),
    ):
        result = run(*arguments, "--json")
        refusal(result, exit_code, code)
        assert "asking" not in result.stderr


@pytest.fixture
def simulator():
    if (reason := onvif_simulator.reason_to_skip()) is not None:
        if os.environ.get("UPPERSON_TEST_ONVIF") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    return onvif_simulator.run_beside_simulator


def test_the_camera_of_somebody_else_is_found_in_the_network(simulator, logins):
    search = ("cameras", "--search", "--interface", "127.0.0.1", "--timeout", 1)
    found = simulator([*search, "--netrc", logins, "--json"], f"{USER}:{PASSWORD}")
    assert found.returncode == 0, found.stderr
    (camera,) = json.loads(found.stdout)["cameras"]
    assert (camera["name"], camera["maker"], camera["problem"]) == ("Gate", "PythonCam", None)
    main, sub = camera["streams"]
    assert (main["address"], sub["address"]) == (
        "rtsp://127.0.0.1:8554/video_main",
        "rtsp://127.0.0.1:8554/video_sub",
    )
    assert (main["width"], main["height"], sub["width"], sub["height"]) == (1920, 1080, 640, 360)
    refused = simulator(search, f"{USER}:{PASSWORD}")
    assert refused.returncode == 3
    assert "missing" in refused.stderr


def test_what_is_found_is_watched_with_the_same_logins(logins, work):
    if (reason := rtsp_camera.reason_to_skip()) is not None:
        if os.environ.get("UPPERSON_TEST_RTSP") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    make_toy_bundle(work / "bundle")
    with rtsp_camera.rtsp_camera(login=(USER, PASSWORD)) as camera:
        with onvif_device(login=(USER, PASSWORD), streams={"main": camera.address}) as device:
            found = run(f"127.0.0.1:{device.port}", "--netrc", logins, "--json")
        (listed,) = json.loads(found.stdout)["cameras"]
        source = f"{listed['name']}={listed['streams'][0]['address']}"
        output = work / "watch.txt"
        options = ("--netrc", logins, "--detector", "hog", "--log-json", "--threads", 1)
        process = start_program("upperson-rt", "watch", source, *options, cwd=work, output=output)
        errors = output.with_name("watch.txt.err")

        def wait_for_event(name):
            wait_for(lambda: f'"{name}"' in errors.read_text() or process.poll() is not None)

        try:
            wait_for_event("connected")
            camera.tell("size 640x480")
            wait_for_event("resolution")
        finally:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            assert process.wait() == 0, errors.read_text()
    said = output.read_text()
    assert "frames: 0 read" not in said
    assert "sources:" not in said, "no loss"
    assert PASSWORD not in said + errors.read_text()
