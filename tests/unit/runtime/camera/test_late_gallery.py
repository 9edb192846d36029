"""A gallery on a server that is away when cameras start: it is opened once the server is back."""

import pytest

from tests.helpers.fake_camera import BOX, START, FakeTime, Gate, check_sums, person_frame, wait_for
from tests.helpers.refused import refused
from tests.helpers.remote_gallery import RemoteGallery
from upperson_camera import Pipeline
from upperson_camera.disk_buffer import DiskBuffer
from upperson_camera.late_gallery import LateGallery, open_now_or_later
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError

ADDRESS = "milvus://ann:secret@host/people"
SHOWN = "milvus://ann@host:19530/people"


class Server:
    """Answers `Gallery.open` with a gallery, or with what `outcome` does."""

    def __init__(self, gallery):
        self.remote = RemoteGallery(gallery)
        self.attempts = []
        self.outcome = self.away

    @staticmethod
    def away():
        raise BackendError("connection refused", code="server_away", location=SHOWN)

    def open(self, address, fingerprint, embed_dim, *, create):
        self.attempts.append((address, fingerprint, embed_dim, create))
        return self.outcome()


@pytest.fixture
def server(gallery, monkeypatch):
    server = Server(gallery)
    monkeypatch.setattr("upperson_camera.late_gallery.Gallery.open", server.open)
    return server


@pytest.fixture
def begun(server, encoder, tmp_path, clock):
    """A pipeline with a camera, started while the server is away, and its gallery."""
    late = open_now_or_later(ADDRESS, encoder.fingerprint, encoder.embed_dim)
    options = {"every_s": 0, "min_views": 1, "save_crops": False, "end_within_s": 1000}
    pipeline = Pipeline(encoder, late, buffer=tmp_path, **options)
    pipeline.start()
    pipeline.add_camera("gate")
    return pipeline, late


def submit(pipeline, numbers):
    for number in numbers:
        pipeline.submit("gate", person_frame(), [BOX], START + number, tracks=[number])
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_waiting == 0)


def test_what_is_accepted_waits_and_is_sent_when_the_server_is_back(
    begun, server, encoder, clock, caplog
):
    pipeline, late = begun
    assert isinstance(late, LateGallery)
    assert (late.location, "secret" in caplog.text) == (SHOWN, False)
    submit(pipeline, range(5))
    wait_for(lambda: pipeline.stats().buffered == 5)
    clock.more_s += 10
    assert pipeline.stats().gallery_problem == "connection refused"
    server.outcome = lambda: server.remote
    assert pipeline.drain(60)
    pipeline.stop()
    check_sums(pipeline.stats())
    assert [item.time for item in server.remote.added] == [START + n for n in range(5)]
    assert pipeline.stats().gallery_problem is None
    assert set(server.attempts) == {(ADDRESS, encoder.fingerprint, encoder.embed_dim, True)}
    late.close()


def test_the_model_is_checked_as_soon_as_the_server_is_back_before_a_row_comes(begun, server):
    def refuse_model():
        raise IntegrityError("of another model", code="gallery_of_other_model")

    pipeline, _ = begun
    server.outcome = refuse_model
    wait_for(lambda: pipeline.stats().failures)
    with refused("gallery_of_other_model", IntegrityError):
        pipeline.stop()


def test_rows_that_do_not_fit_the_gallery_are_kept_and_named(
    begun, server, encoder, tmp_path, caplog
):
    def refuse_model():
        raise IntegrityError("of another model", code="gallery_of_other_model")

    pipeline, late = begun
    submit(pipeline, range(3))
    wait_for(lambda: pipeline.stats().buffered == 3)
    server.outcome = refuse_model
    wait_for(lambda: pipeline.stats().failures)
    with refused("gallery_of_other_model", IntegrityError):
        pipeline.stop()
    check_sums(pipeline.stats(), ended=False)
    assert [r.waiting for r in caplog.records if r.event == "buffered"] == [3]
    buffer = DiskBuffer(tmp_path, late, 1 << 30)
    assert buffer.open() == 3
    buffer.close()


def test_a_user_that_is_refused_later_is_warned_of_at_a_bounded_rate(begun, server, clock, caplog):
    def refuse_user():
        raise BackendError("wrong password", code="user_refused")

    def warnings():
        return [r for r in caplog.records if r.event == "gallery_away" and "password" in r.message]

    pipeline, _ = begun
    server.outcome = refuse_user
    tries = len(server.attempts)
    wait_for(lambda: len(server.attempts) > tries + 20)
    for minute in range(1, 4):
        clock.more_s += 61
        wait_for(lambda count=minute: len(warnings()) == count)
    assert pipeline.stats().gallery_problem == "wrong password"
    tries = len(server.attempts)
    wait_for(lambda: len(server.attempts) > tries + 20)
    assert len(warnings()) == 3
    with refused("gallery_away", BackendError, waiting=0) as error:
        pipeline.stop()
    assert "wrong password" in str(error.value)


def test_an_opening_that_hangs_at_the_end_is_abandoned(begun, server, monkeypatch):
    pipeline, _ = begun
    stopped = FakeTime()
    monkeypatch.setattr("upperson_camera.queues.time", stopped)
    monkeypatch.setattr("upperson_camera.pipeline.time_module", stopped)
    with Gate() as gate:
        server.outcome = gate.hold
        wait_for(lambda: gate.entered == 1)
        finish = pipeline._buffer.finish
        monkeypatch.setattr(
            pipeline._buffer, "finish", lambda: [finish(), setattr(stopped, "more_s", 2000)]
        )
        with refused("gallery_away", BackendError, waiting=0):
            pipeline.stop()
        assert pipeline.stats().stuck


@pytest.mark.parametrize(
    "error",
    [
        BackendError("wrong password", code="user_refused"),
        BackendError("not installed", code="extra_missing"),
        IntegrityError("of another model", code="gallery_of_other_model"),
        UsageError("malformed", code="location_malformed"),
        InputError("in use", code="gallery_in_use"),
    ],
    ids=lambda error: error.code,
)
def test_what_will_never_work_is_refused_at_once(server, error):
    def fail():
        raise error

    server.outcome = fail
    with refused(error.code, type(error)):
        open_now_or_later(ADDRESS, "a" * 16, 8)
    assert len(server.attempts) == 1
