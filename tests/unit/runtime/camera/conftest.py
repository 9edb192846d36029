"""What the tests of cameras share: a toy model, its encoder, and an empty gallery."""

import os

import pytest

import upperson_rt
from tests.helpers.fake_camera import FakeTime, check_sums
from tests.helpers.rtsp_camera import reason_to_skip
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_camera import Pipeline
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Gallery
from upperson_synthetic.video import VideoSpec, write_video


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("camera") / "bundle")


@pytest.fixture
def encoder(bundle):
    return upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)


@pytest.fixture
def gallery(tmp_path, encoder):
    with Gallery.open(
        tmp_path / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as opened:
        yield opened


@pytest.fixture(scope="session")
def street(tmp_path_factory):
    """A video with its boxes beside it, and what is true about it."""
    path = tmp_path_factory.mktemp("street") / "street.avi"
    spec = VideoSpec(people=6, seconds=12, fps=8, width=640, height=360, seed=5)
    return path, write_video(path, spec)


@pytest.fixture(autouse=True)
def everything_is_counted():
    """Wherever a pipeline ends, all that came in was counted, and nothing waits but on disk."""
    stop = Pipeline.stop

    def stop_and_check(pipeline):
        try:
            stop(pipeline)
        except UsageError:  # It goes on.
            raise
        except BaseException:
            check_sums(pipeline.stats(), ended=pipeline._buffer is None)
            raise
        stats = pipeline.stats()  # A defect leaves a frame's work half done.
        has_defect = any("defect" in camera.failures for camera in stats.cameras.values())
        check_sums(stats, ended=not has_defect)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Pipeline, "stop", stop_and_check)
        yield


@pytest.fixture
def fake_time(monkeypatch):
    """The clock of what reads sources, which can be set forward."""
    found = FakeTime()
    monkeypatch.setattr("upperson_camera.capture.time", found)
    return found


@pytest.fixture
def clock(monkeypatch):
    """The clock of the threads before a gallery on a server, whose pauses last no time."""
    clock = FakeTime()
    clock.sleep = lambda seconds: None
    monkeypatch.setattr("upperson_camera.buffered.time", clock)
    monkeypatch.setattr("upperson_camera.buffered._FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr("upperson_camera.buffered._LONGEST_PAUSE_S", 0.01)
    return clock


@pytest.fixture(scope="session")
def there_is_a_server():
    """A camera's RTSP server can run here; else tests are skipped, or fail where it is required."""
    reason = reason_to_skip()
    if reason and os.environ.get("UPPERSON_TEST_RTSP") == "required":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)


@pytest.fixture
def patience(monkeypatch):
    """The clock by which calls last too long; a busy machine does not move it."""
    clock = FakeTime()
    for module in ("queues.time", "cameras.time", "pipeline.time_module"):
        monkeypatch.setattr(f"upperson_camera.{module}", clock)
    return clock
