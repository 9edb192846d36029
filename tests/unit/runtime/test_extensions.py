"""Extensions are found by entry points, imported when they are used, and refused by name."""

import sys

import numpy as np
import pytest

from tests.helpers.extensions import examples, installed
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import draw_person
from upperson_rt import extensions
from upperson_rt.bundle import MANIFEST_FILE, read_manifest
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.gallery import Gallery, Item
from upperson_rt.search.query_log import open_query_log


def test_an_extension_is_imported_when_it_is_used(tmp_path):
    (tmp_path / "late_module.py").write_text("def make():\n    return 5\n")
    with installed(tmp_path, {"upperson.outputs": {"late": "late_module:make"}}, tmp_path):
        assert extension_names("outputs") == ["late"]
        assert "late_module" not in sys.modules
        assert load_extension("outputs", "late")() == 5
    assert extension_names("outputs") == []


def test_what_cannot_be_used_is_refused(tmp_path):
    (tmp_path / "failing_module.py").write_text("1 / 0\n")
    points = {"broken": "failing_module:make", "gone": "no_such_module:make", "same": "json:dumps"}
    other = {"same": "json:loads"}
    with (
        installed(tmp_path, {"upperson.outputs": points}, tmp_path),
        installed(tmp_path, {"upperson.outputs": other}),
    ):
        assert extension_names("outputs") == ["broken", "gone", "same"]
        for name in ("broken", "gone"):
            with refused("extension_broken", BackendError, group="outputs", name=name):
                load_extension("outputs", name)
        with refused("extension_twice", UsageError, group="outputs", name="same"):
            load_extension("outputs", "same")
        with refused("extension_not_found", UsageError, group="outputs", name="other"):
            load_extension("outputs", "other")
    one = {"upperson.outputs": {"same": "json:dumps"}}
    with installed(tmp_path, one), installed(tmp_path, one):
        load_extension("outputs", "same")  # One package that is found twice.


def test_without_a_service_nothing_is_deleted_logged_or_trusted(tmp_path, monkeypatch):
    with Gallery.open(tmp_path / "gallery", "a model", 2, create=True) as gallery:
        gallery.add([Item(key="a"), Item(key="b")], np.eye(2, dtype=np.float32))
        gallery.bin.add(["a"], "ann", "")
        with monkeypatch.context() as patch:
            patch.setattr(extensions, "_named", lambda group: {})
            for delete in (lambda: gallery.delete(["b"]), gallery.bin.delete):
                with refused("service_missing", BackendError, name="erasure-log"):
                    delete()
            with refused("service_missing", BackendError, name="query-log"):
                open_query_log(tmp_path / "log")
            (tmp_path / MANIFEST_FILE).write_text("{}")
            with refused("service_missing", BackendError, name="signature"):
                read_manifest(tmp_path, tmp_path / "key.pem")
        assert (gallery.count(), len(gallery.bin.entries())) == (1, 1)
        assert gallery.delete(["b"]) == gallery.bin.delete() == 1


def test_the_example_of_a_source(tmp_path):
    from upperson_camera.source import Source

    folder = tmp_path / "uploads"
    source = Source(address=f"pictures://{folder}", kind="network")
    with examples(tmp_path):
        open_source = load_extension("sources", "pictures")
    with pytest.raises(InputError):
        open_source(source, 0.0)
    folder.mkdir()
    for name, colour in {"0.png": "red", "1.png": "blue"}.items():
        draw_person(folder / name, colour)
    reader = open_source(source, 0.0)
    first = reader.read()
    reader.close()
    (folder / "2.png").write_text("no picture")
    again = open_source(source, 0.0)  # Goes on behind the first picture.
    frames = [first, again.read()]
    assert [frame.mean(axis=(0, 1)).argmax() for frame in frames] == [2, 0]  # BGR
    assert again.read().size == 0
    assert again.read() is None
