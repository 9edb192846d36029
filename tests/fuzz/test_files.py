"""Files of users are read or refused in one line, whatever is in them."""

import base64
import json
import shutil

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import example
from hypothesis import strategies as st

from tests.helpers.data_sets import WRITERS
from tests.helpers.fuzzing import (
    as_json,
    damaged_bytes,
    damaged_json,
    examples,
    fuzz,
    json_values,
    nested,
    refused_well,
)
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bundle import calibrate_toy_bundle, replace_in_bundle
from tests.unit.calibration.test_file import calibration
from upperson.config import TrainConfig, read_config
from upperson.data.check import check_dataset
from upperson_autotune.autotuner import Measurement
from upperson_calibration.calibration_file import Calibration, read_calibration
from upperson_rt.bundle import Bundle
from upperson_rt.errors import UppersonError
from upperson_rt.logistic import probability
from upperson_rt.manifest import Manifest, parse_manifest
from upperson_rt.score_calibration import PICTURE_FEATURES, ScoreCalibration, read_score_calibration
from upperson_rt.strict import read_fields
from upperson_rt.tokenizer import Tokenizer
from upperson_signature.signature import named_key, read_private_key, sign_folder, verify_folder
from upperson_tensorrt.cache import EngineRecord

_FIRST = {}


def first(bundle, name):
    """What a file of the bundle held at first."""
    return _FIRST.setdefault(name, (bundle / name).read_bytes())


@fuzz(data=st.data())
def test_manifests(bundle, data):
    document = json.loads(first(bundle, "bundle.json"))
    found = refused_well(parse_manifest, as_json(data.draw(damaged_json(document))))
    if isinstance(found, Manifest):
        assert parse_manifest(found.to_json()) == found


@fuzz(data=st.data())
def test_score_calibrations(bundle, written, data):
    calibrated = shutil.copytree(bundle, bundle.parent / "calibrated", dirs_exist_ok=True)
    made = calibrate_toy_bundle(calibrated)
    file = written("scores.json", data.draw(damaged_json(json.loads(made.to_json()))))
    found = refused_well(read_score_calibration, file, made.fingerprint)
    if isinstance(found, ScoreCalibration):
        likely = probability(found.picture.log_odds(np.ones((1, PICTURE_FEATURES))))
        assert 0 <= likely[0] <= 1


@fuzz(document=st.one_of(json_values, st.sampled_from([nested(3000), {"a": nested(3000)}])))
@example(document=10**5000)
@example(document={"schema_version": 10**400})
@example(document={"schema_version": True})
def test_manifests_of_another_kind(document):
    try:
        text = as_json(document)
    except RecursionError:
        text = "[" * 3000
    assert isinstance(refused_well(parse_manifest, text), UppersonError)


NAMES = ["tokenizer.json", "canaries.npz", "image.int8.onnx", "text.int8.onnx"]


@fuzz(data=st.data(), name=st.sampled_from(NAMES))
def test_files_of_a_bundle(bundle, tmp_path_factory, data, name):
    """Its hashes are right, as those of a hostile bundle are."""
    content = data.draw(damaged_bytes([first(bundle, name)]))
    copy = shutil.copytree(bundle, tmp_path_factory.mktemp("copies") / "bundle")
    replace_in_bundle(copy, name, content)
    opened = refused_well(Bundle.open, copy, "int8", "onnxruntime", threads=1)
    if isinstance(opened, Bundle):
        refused_well(opened.backend, "image")
        refused_well(opened.encoder().encode_texts, ["red"])
    shutil.rmtree(copy)


@fuzz(data=st.data())
def test_tokenizers(bundle, written, data):
    document = data.draw(damaged_json(json.loads(first(bundle, "tokenizer.json"))))
    found = refused_well(Tokenizer.from_file, written("tokenizer.json", document))
    if isinstance(found, Tokenizer):
        refused_well(found.encode, ["a woman in a red coat"])


def damaged_file(content, is_json):
    """Damage the bytes of a file, or what it says as JSON."""
    if not is_json:
        return damaged_bytes([content])
    document = damaged_json(json.loads(content))
    return document.map(lambda found: as_json(found).encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def signed(bundle, tmp_path_factory):
    """A signed bundle, the public key, and its fingerprint."""
    folder = tmp_path_factory.mktemp("signed")
    copy = shutil.copytree(bundle, folder / "bundle")
    write_keys(folder, "key", ec.generate_private_key(ec.SECP256R1()))
    fingerprint = sign_folder(copy, read_private_key(folder / "key.pem"), "toy")
    return copy, folder / "key.pub", fingerprint


@fuzz(data=st.data(), whole=st.booleans())
def test_signatures(signed, data, whole):
    """A genuine statement may be packed in another way; nothing else is believed."""
    folder, key, fingerprint = signed
    content = first(folder, "model.sig")
    damaged = data.draw(damaged_file(content, whole))
    (folder / "model.sig").write_bytes(damaged)
    found = refused_well(verify_folder, folder, key)
    if not isinstance(found, UppersonError):
        assert found == fingerprint
        packed = (json.loads(text)["dsseEnvelope"]["payload"] for text in (damaged, content))
        assert len(set(map(base64.b64decode, packed))) == 1
    assert isinstance(refused_well(named_key, folder), str | UppersonError)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A small data set of each kind: its folder, and its annotations as they are at first."""
    made = {}
    for name, write in WRITERS.items():
        folder = tmp_path_factory.mktemp("sets") / name
        folder.mkdir()
        write(folder)
        kinds = (".json", ".jsonl", ".csv")
        files = sorted(path for path in folder.rglob("*") if path.suffix in kinds)
        made[name] = folder, {path: path.read_bytes() for path in files}
    return made


@fuzz(data=st.data(), name=st.sampled_from(sorted(WRITERS)), whole=st.booleans())
def test_data_sets(sets, data, name, whole):
    folder, files = sets[name]
    path = data.draw(st.sampled_from(sorted(files)))
    path.write_bytes(data.draw(damaged_file(files[path], whole and path.suffix == ".json")))
    root = next(place for place in (folder, path.parent) if place.is_dir())
    try:
        refused_well(check_dataset, name, root, decode=False)
    finally:
        path.write_bytes(files[path])


CONFIG = b"""root: people
dataset: jsonl
base: ViT-B-16
epochs: 5
lr: 1.0e-3
model: {lora_rank: 4, prefix_blocks: all}
"""


@fuzz(content=damaged_bytes([CONFIG]))
@examples(
    {"content": CONFIG.replace(b"prefix_blocks: all", b"prefix_blocks: " + b"9" * 5000)},
    {"content": CONFIG.replace(b"dataset: jsonl", b"dataset: " + b"x" * 10**5)},
    *({"content": content} for content in (
        b"lr: " + b"[" * 1000, b"&a [*a, *a]: 1", b"? {a: 1}\n: 2", b"when: 2026-99-99",
        b"a: !!python/object/apply:os.system [ls]", b"seed: !!binary '\xff'",
    )),
)  # fmt: skip
def test_settings_of_a_run(written, content):
    found = refused_well(read_config, written("config.yaml", content))
    assert isinstance(found, TrainConfig | UppersonError)


CALIBRATION = json.loads(calibration().to_json())


@fuzz(document=damaged_json(CALIBRATION))
@example(document={**CALIBRATION, "towers": {"9" * 5000: {}}})
def test_calibrations(written, document):
    found = refused_well(read_calibration, written("calibration.json", document))
    assert isinstance(found, Calibration | UppersonError)


@fuzz(kind=st.sampled_from([Manifest, Calibration, Measurement, EngineRecord]), content=json_values)
def test_strict_reading(kind, content):
    assert isinstance(refused_well(read_fields, kind, content, "file"), kind | UppersonError)
