"""Galleries that were closed, and that a killed process left; code in processes of its own."""

import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest

from tests.helpers.command_line import environment
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from upperson_rt.gallery import Gallery, Item

PREFIX = """
import os, resource, shutil, signal, sys
from pathlib import Path
import numpy as np
from tests.helpers.gallery_places import DIM, FINGERPRINT, some_vectors
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Item
folder = Path(sys.argv[1])
"""
KILLED = """
kept = []
for place in (folder / "killed", folder / "other"):
    gallery = Gallery.open(place, FINGERPRINT, DIM, create=True)
    kept.append(gallery)
    for number in range(6):
        gallery.add([Item(key=f"{number}-{i}") for i in range(20)], some_vectors(20, number))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def gallery(tmp_path):
    """A new gallery in a folder."""
    with Gallery.open(tmp_path / "gallery", FINGERPRINT, DIM, create=True) as opened:
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
    with Gallery.open(folder, FINGERPRINT, DIM, create=True) as gallery:
        gallery.add(items(300), some_vectors(300))
    return folder


@pytest.fixture
def closed(closed_gallery, tmp_path):
    """The folder of a gallery of 300 pictures of three cameras, closed."""
    return shutil.copytree(closed_gallery, tmp_path / "closed")


def items(count, start=0):
    return [
        Item(key=f"k{i}", camera=f"c{i % 3}", time=float(i)) for i in range(start, start + count)
    ]
