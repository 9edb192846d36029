import os
from pathlib import Path

import pytest

from upperson_rt.atomic import new_folder, write_atomically
from upperson_rt.errors import InputError


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_atomically(tmp_path / "deep" / "a.txt", "one")

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_atomically(tmp_path / "deep" / "a.txt", "two")
    assert (tmp_path / "deep" / "a.txt").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.txt"]


def test_an_interrupted_swap_brings_the_older_folder_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    real = os.replace

    def interrupted(source, target):
        if Path(target) == tmp_path / "out" and Path(source).parent == tmp_path:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        new_folder(tmp_path / "out", is_earlier=lambda _: True) as folder,
    ):
        (folder / "new").write_text("new")
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["out", "out/old"]


@pytest.mark.parametrize("name", ["file", "folder", "."])
def test_what_is_not_ours_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").write_text("mine")
    with pytest.raises(InputError), new_folder(Path(name), is_earlier=lambda _: False):
        pass
    assert (tmp_path / "folder" / "mine").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "folder"}
