"""Galleries that were closed, and that a killed process left; code in processes of its own."""

import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import open_new, put

PREFIX = """
import os, resource, shutil, signal, sys
from pathlib import Path
import numpy as np
from tests.helpers.gallery_places import DIM, FINGERPRINT, open_new, put, some_vectors
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Item
folder = Path(sys.argv[1])
"""
KILLED = """
kept = []
for place in (folder / "killed", folder / "other"):
    kept.append(open_new(place))
    for number in range(6):
        put(kept[-1], [f"{number}-{i}" for i in range(20)], number)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def gallery(tmp_path):
    with open_new(tmp_path / "gallery") as opened:
        yield opened


@pytest.fixture(scope="session")
def start():
    """Runs code in a process of its own, with the names above."""
    with ExitStack() as stack:

        def run(code, *arguments):
            process = subprocess.Popen(
                [sys.executable, "-c", PREFIX + code, *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(),
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture(scope="session")
def killed_galleries(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("killed")
    assert start(KILLED, folder).wait() == -signal.SIGKILL
    return folder


@pytest.fixture
def killed(killed_galleries, tmp_path):
    """The folder of a gallery whose process was killed after six additions of 20 pictures."""
    return shutil.copytree(killed_galleries / "killed", tmp_path / "killed")


@pytest.fixture(scope="session")
def closed_gallery(tmp_path_factory):
    folder = tmp_path_factory.mktemp("closed") / "closed"
    with open_new(folder) as gallery:
        put_of_cameras(gallery, 300)
    return folder


@pytest.fixture
def closed(closed_gallery, tmp_path):
    """The folder of a gallery of 300 pictures of three cameras, closed."""
    return shutil.copytree(closed_gallery, tmp_path / "closed")


def put_of_cameras(gallery, count, start=0, seed=0):
    """Add pictures of three cameras, a second apart."""
    put(gallery, range(start, start + count), seed, camera=lambda n: f"c{n % 3}", time=float)
