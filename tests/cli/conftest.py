"""What tests of the command lines start from."""

import shutil

import pytest


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def people(demo_folder):
    """The quick demo's data set."""
    (root,) = (demo_folder / "people").iterdir()
    return root


@pytest.fixture
def copied_run(demo_folder, work):
    return shutil.copytree(demo_folder / "run", work / "run")
