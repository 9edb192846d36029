"""A console over a toy bundle and a gallery of tracks, without a network."""

import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest

from tests.helpers.console import ODD, START, Client, client_of
from tests.helpers.toy_bundle import COLOURS, calibrate_toy_bundle, draw_person, make_toy_bundle
from upperson_console import guard
from upperson_console.accounts import Access, Account, Accounts, add_token
from upperson_console.app import make_app
from upperson_console.service import ConsoleService
from upperson_console.translation import LOCALE, Locale
from upperson_console.user_state import UserState
from upperson_log.query_log import QueryLog
from upperson_rt.bundle import open_encoder
from upperson_rt.gallery import Gallery, Item

LOCAL = Account(name="local", role="admin", logs_in=False)


@pytest.fixture(autouse=True)
def unpaced(monkeypatch):
    """Large bodies are read without the pauses that let other requests run."""
    monkeypatch.setattr(guard, "_LARGE_BYTES_PER_S", 1 << 40)
    monkeypatch.setattr(guard, "_DRAINED_BYTES_PER_S", 1 << 40)


@pytest.fixture(scope="session")
def served_encoder(served_folder):
    """The encoder of the bundle, with its towers loaded once."""
    return open_encoder(served_folder / "bundle", threads=1)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory):
    """A bundle, and a gallery with a track of each colour at two cameras."""
    folder = tmp_path_factory.mktemp("served")
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    items, files = [], []
    space = encoder.fingerprint, encoder.embed_dim
    with Gallery.open(folder / "gallery", *space, create=True) as gallery:
        gallery.crops_dir.mkdir()
        for place, colour in enumerate(COLOURS):
            for number, camera in enumerate(("gate", "gate", ODD)):
                crop = f"{colour}{number}.png"
                files.append(draw_person(gallery.crops_dir / crop, colour, seed=number))
                late = 7200 if camera == ODD else 0
                items.append(
                    Item(
                        key=f"{colour}-{number}",
                        camera=camera,
                        time=START + 600 * place + 10 * number + late,
                        track=f"{colour}-{camera == ODD}",
                        crop=crop,
                        attributes={"floor": place % 2},
                    )
                )
        gallery.add(items, encoder.encode_images(files))
    return folder


@pytest.fixture(scope="session")
def calibrated_encoder(served_folder, tmp_path_factory):
    """The encoder of the same bundle with a score calibration."""
    bundle = tmp_path_factory.mktemp("calibrated") / "bundle"
    shutil.copytree(served_folder / "bundle", bundle)
    calibrate_toy_bundle(bundle)
    return open_encoder(bundle, threads=1)


@cache
def background(encoder):
    """Embeddings of people who are in no gallery."""
    with TemporaryDirectory() as folder:
        files = [draw_person(Path(folder, f"{c}.png"), c, seed=50) for c in COLOURS]
        return encoder.encode_images(files)


def make_service(gallery, state, encoder, oversight=None):
    """The use cases over a gallery, with log and user state in a folder."""
    return ConsoleService(
        encoder,
        lambda: Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim),
        QueryLog(state / "query.log"),
        UserState(state / "console.sqlite"),
        background(encoder),
        oversight=oversight,
    )


def made(gallery, state, encoder, accounts=None, names=(), oversight=None):
    """A console over a gallery, with its log and state in a folder."""
    service = make_service(gallery, state, encoder, oversight)
    app = make_app(service, Access(accounts, LOCAL, oversight), names)
    return SimpleNamespace(
        service=service, app=app, client=Client(app), folder=gallery, log=state / "query.log"
    )


@pytest.fixture
def make_console(served_folder, served_encoder, tmp_path):
    """Makes a console over a copy of the gallery; arguments as for `made`, all with defaults."""
    opened = []

    def make(folder=None, encoder=served_encoder, **more):
        if folder is None:
            folder = tmp_path / "gallery"
            if not folder.exists():
                shutil.copytree(served_folder / "gallery", folder)
        opened.append(made(folder, tmp_path, encoder, **more))
        return opened[-1]

    yield make
    for console in opened:
        console.service.close()


@pytest.fixture(scope="session")
def reader(served_folder, served_encoder, tmp_path_factory):
    """A console that many tests share: they only read it."""
    state = tmp_path_factory.mktemp("reader")
    console = made(served_folder / "gallery", state, served_encoder, names=["cam.example"])
    yield console
    console.service.close()


@pytest.fixture
def console(make_console):
    """A console without a login."""
    return make_console()


@pytest.fixture
def calibrated(make_console, calibrated_encoder):
    """A console whose scores are calibrated, over a gallery that is large enough for it.

    A camera more has a picture of each colour, hours later.
    """
    console = make_console(encoder=calibrated_encoder)
    folder = console.folder / "crops"
    files = [draw_person(folder / f"{colour}9.png", colour, seed=9) for colour in COLOURS]
    items = [
        Item(key=f"{c}-9", camera="yard", time=START + 20_000 + n, track=f"{c}-9", crop=f"{c}9.png")
        for n, c in enumerate(COLOURS)
    ]
    console.service.gallery.add(items, calibrated_encoder.encode_images(files))
    return console


@pytest.fixture
def make_guarded(make_console, tmp_path):
    """Makes a console with a login, and a client for each role; arguments as for `made`."""

    def make(**more):
        file = tmp_path / "tokens.json"
        roles = {"admin": ("ada", None), "operator": ("olga", None), "viewer": ("vera", ("gate",))}
        tokens = {role: add_token(file, n, role, cameras) for role, (n, cameras) in roles.items()}
        made = make_console(accounts=Accounts(file), **more)
        clients = {role: client_of(made, token) for role, token in tokens.items()}
        return SimpleNamespace(**vars(made), tokens=tokens, token_file=file, **clients)

    return make


@pytest.fixture
def guarded(make_guarded):
    return make_guarded()


@pytest.fixture
def in_locale():
    """Sets language and zone of the reader."""
    before = LOCALE.get()
    yield lambda **more: LOCALE.set(lambda: Locale(**more))
    LOCALE.set(before)


@pytest.fixture
def full_disk(monkeypatch):
    """Returns what makes the query log fail as on a full disk, for the length of a block."""

    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    @contextmanager
    def on_full_disk():
        with monkeypatch.context() as patch:
            patch.setattr("upperson_log.writer.write_head", full)
            yield

    return on_full_disk


@pytest.fixture(scope="session")
def red_jpeg(tmp_path_factory):
    """The content of a picture of a person in red."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("red")
    with Image.open(draw_person(folder / "a.png", "red", seed=9)) as image:
        image.convert("RGB").save(folder / "a.jpg", quality=95)
    return (folder / "a.jpg").read_bytes()
