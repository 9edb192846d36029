"""Adapter files: the bundle made of one and a base is the exported one, byte for byte."""

import json
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock

from tests.helpers.invoke import run_failing, run_rt, run_rt_json, snapshot
from tests.helpers.refused import refused
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bases import PARTS, SIZE, know_toy_towers, random_ids, toy_base
from tests.helpers.toy_bundle import make_toy_tokenizer_json
from tests.helpers.toy_clip import disturb
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_adapter import apply
from upperson_adapter.apply import apply_adapter, restore_base
from upperson_adapter.package import AdapterFile, read_tensors
from upperson_adapter.weights import fold_trained
from upperson_calibration.samples import CalibrationSet
from upperson_export.adapter import AdapterBase, write_adapter
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_export.variants import VARIANTS
from upperson_rt.bundle import Bundle
from upperson_rt.errors import InputError, IntegrityError, UppersonError, UsageError
from upperson_rt.manifest import NO_ADAPTER

pytestmark = pytest.mark.timeout(240, func_only=True)

STATISTICS = ((0.5, 0.4, 0.3), (0.5, 0.4, 0.6))
ALL = tuple(name for name in VARIANTS if name != "fp32")


def model_of(kind, parts, seed=0):
    """Build UP-Person over a toy base; trained tensors matter, and are float16 numbers."""
    model = UPPerson(toy_base(kind, seed), parts, SIZE, STATISTICS).eval()
    disturb(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.half())
    return model


def export(model, kind, adapter, output, **options):
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (6, *SIZE, 3), np.uint8)
    ids = random_ids(kind, [14, 9, 4, 7, 11, 5]).numpy()
    samples = CalibrationSet(images, ids, "toys", "toys")
    identity = ModelIdentity(
        name="site" if adapter != NO_ADAPTER else kind,
        base=kind,
        base_sha256="0" * 64,
        adapter_sha256=adapter,
        embed_dim=model.embed_dim,
    )
    export_bundle(
        model, identity, make_toy_tokenizer_json(), samples, None, output,
        ExportOptions(**options), lambda work, done, total: None,
    )  # fmt: skip


def exported(kind, folder):
    """Fill a folder with ``base``, ``home``, the exported bundle, and ``site.adapter``."""
    write_keys(folder, "key", ec.generate_private_key(ec.SECP256R1()))
    export(model_of(kind, PLAIN_CLIP), kind, NO_ADAPTER, folder / "base", variants=("int8",))
    onto = AdapterBase.open(folder / "base")
    model = model_of(kind, PARTS)
    export(
        model, kind, "1" * 64, folder / "home",
        variants=ALL, onto=onto, sign=folder / "key.pem",
    )  # fmt: skip
    write_adapter(folder / "home", onto, model, "site", "float16", folder / "site.adapter")


@pytest.fixture(scope="session")
def of_clip(shared_folder):
    """The folder of a CLIP, made once a session."""
    folder = shared_folder / "adapter"
    with FileLock(f"{folder}.lock"):
        if not (folder / "site.adapter").exists():
            folder.mkdir(exist_ok=True)
            exported("clip", folder)
    return folder


@pytest.fixture
def site(of_clip, tmp_path, monkeypatch):
    """A copy of that folder, which is the working folder."""
    copy = shutil.copytree(of_clip, tmp_path / "site")
    monkeypatch.chdir(copy)
    return copy


def test_the_bundle_is_the_exported_one_byte_for_byte_and_the_base_comes_back(site):
    before = snapshot(site / "base")
    manifest = apply_adapter("site.adapter", "base", "bundle", trust="key.pub")
    assert set(manifest.variants) == {"fp32", *ALL}
    assert snapshot(site / "bundle") == snapshot(site / "home")
    restore_base("base", "bundle")
    assert snapshot(site / "bundle") == before == snapshot(site / "base")
    assert {path.name for path in site.iterdir()} == {
        "base", "home", "bundle", "site.adapter", "key.pem", "key.pub",
    }  # fmt: skip


def test_so_is_that_of_siglip_with_attention_pooling(tmp_path, monkeypatch):
    know_toy_towers(monkeypatch)
    exported("siglip", tmp_path)
    apply_adapter(tmp_path / "site.adapter", tmp_path / "base", tmp_path / "bundle")
    assert snapshot(tmp_path / "bundle") == snapshot(tmp_path / "home")


def test_command_lines_apply_describe_and_remove(site):
    applied = run_rt_json("apply", "site.adapter", "-b", "base", "-o", "bundle")
    assert (applied["name"], set(applied["variants"])) == ("site", {"fp32", *ALL})
    assert applied == run_rt_json("info", "-b", "bundle")
    assert applied["signed_by"] is not None
    assert applied["adapter_sha256"] == "1" * 64
    assert "site" in run_rt("info", "-b", "bundle").stdout
    removed = run_rt_json("apply", "--remove", "-b", "base", "-o", "bundle")
    assert (removed["adapter_sha256"], removed["signed_by"]) == (None, None)


def test_the_adapter_is_small_and_holds_what_was_trained(site):
    with AdapterFile("site.adapter") as file:
        trained = {tower: file.trained(tower) for tower in ("image", "text")}
        assert set(file.manifest.copied) == {"tokenizer.json"}
        literal = sum(len(file.graph(name)) for name in file.manifest.graphs)
    model = model_of("clip", PARTS)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(v.size for tensors in trained.values() for v in tensors.values()) == wanted
    assert {v.dtype for tensors in trained.values() for v in tensors.values()} == {
        np.dtype(np.float16)
    }
    graphs = sum(path.stat().st_size for path in (site / "home").glob("*.onnx"))
    assert literal < graphs / 4
