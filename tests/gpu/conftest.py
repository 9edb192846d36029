"""What tests on a GPU need. Without one all are skipped; without a library those that need it.

``UPPERSON_TEST_GPU=stand-in`` runs the tier on the CPU and on the fakes of driver and TensorRT: so
it is known, before there is a GPU, that the tests themselves work (``tests/cli/test_gpu_tier.py``).
"""

import os

import pytest
import torch

from benchmarks.gpu_libraries import (
    missing_gpu,
    missing_onnxruntime,
    missing_tensorrt,
    missing_torch,
)
from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import export_exchanged
from upperson.cli.exportable import calibration_samples
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer, clip_tokenizer_json
from upperson_export import candidates
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_synthetic import SyntheticSpec, write_dataset
from upperson_tensorrt.bindings import import_tensorrt
from upperson_tensorrt.cuda import Cuda

STAND_IN = os.environ.get("UPPERSON_TEST_GPU") == "stand-in"


def pytest_runtest_setup():
    if not STAND_IN:
        skip_if(missing_gpu())


def skip_if(missing):
    if missing:
        pytest.skip(missing)


@pytest.fixture(scope="session", autouse=True)
def stand_in():
    """Put the fakes in place, if they are asked for."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if STAND_IN:
            install_fake_tensorrt(monkeypatch, VERSIONS[-1])
        yield


@pytest.fixture(scope="session")
def card():
    """What no stand-in can do."""
    skip_if("the stand-in is no GPU" if STAND_IN else "")


@pytest.fixture(scope="session")
def cuda():
    return Cuda()


@pytest.fixture(scope="session")
def torch_gpu(card):
    skip_if(missing_torch())
    return torch


@pytest.fixture(scope="session")
def train_device():
    skip_if("" if STAND_IN else missing_torch())
    return "cpu" if STAND_IN else "cuda"


@pytest.fixture(scope="session")
def onnxruntime_device():
    skip_if("" if STAND_IN else missing_onnxruntime())
    return "cpu" if STAND_IN else "cuda"


@pytest.fixture(scope="session")
def trt():
    skip_if(missing_tensorrt())
    return import_tensorrt()


@pytest.fixture(scope="session")
def bundle(toy_graphs, tmp_path_factory):
    """The toy model in all variants that TensorRT runs."""
    folder, model = tmp_path_factory.mktemp("gpu"), toy_model()
    people = SyntheticSpec(look="street", train_ids=6, val_ids=0, test_ids=0, views=2)
    height_px, width_px = model.image_size
    samples = calibration_samples(
        read_dataset("jsonl", write_dataset(folder / "people", people))["train"], "train",
        clip_tokenizer(), height_px=height_px, width_px=width_px, count=12, seed=0,
    )  # fmt: skip
    identity = ModelIdentity(
        name="toy", base="toy", base_sha256="0" * 64, adapter_sha256="0" * 64, embed_dim=24
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(candidates, "export_onnx", export_exchanged)  # A trace takes seconds.
        export_bundle(
            model, identity, clip_tokenizer_json(), samples, None, folder / "bundle",
            ExportOptions(variants=("fp16", "int8-fp16")), lambda work, done, total: None,
        )  # fmt: skip
    return folder / "bundle"
