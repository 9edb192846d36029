"""Adapter files: the bundle made of one and a base is the exported one, byte for byte."""

import errno
import json
import math
import multiprocessing
import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock

from tests.helpers.invoke import refusal, run_rt, run_rt_json, snapshot
from tests.helpers.refused import refused
from tests.helpers.signing_keys import write_keys
from tests.helpers.toy_bases import PARTS, SIZE, know_toy_towers, random_ids, toy_base
from tests.helpers.toy_bundle import make_toy_tokenizer_json
from tests.helpers.toy_clip import disturb
from tests.helpers.traces import as_in, once_in
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_adapter import apply
from upperson_adapter.apply import apply_adapter, restore_base
from upperson_adapter.package import AdapterFile, pack_tensors, read_tensors
from upperson_adapter.weights import fold_trained
from upperson_calibration.samples import CalibrationSet
from upperson_export import candidates
from upperson_export.adapter import AdapterBase, round_trained, write_adapter
from upperson_export.bundle import ExportOptions, ModelIdentity, export_bundle
from upperson_export.variants import VARIANTS
from upperson_rt.bundle import Bundle, read_manifest
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.manifest import NO_ADAPTER, space_fingerprint
from upperson_rt.towers import TOWERS
from upperson_signature.signature import files_of_signature, read_private_key, sign_files

pytestmark = pytest.mark.timeout(240)

STATISTICS = ((0.5, 0.4, 0.3), (0.5, 0.4, 0.6))
ALL = tuple(name for name in VARIANTS if name != "fp32")


def model_of(kind, parts, seed=0):
    """Build UP-Person over a toy base; trained tensors matter, and are float16 numbers."""
    model = UPPerson(toy_base(kind, seed), parts, SIZE, STATISTICS).eval()
    disturb(model)
    round_trained(model, "float16")
    return model


def export(model, kind, adapter, output, traced, **options):
    """Export with what does as `export_onnx`: a trace takes seconds."""
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "export_onnx", traced)
        export_bundle(
            model, identity, make_toy_tokenizer_json(), samples, None, output,
            ExportOptions(**options), lambda work, done, total: None,
        )  # fmt: skip


def exported(kind, folder, traces, base_variants, variants):
    """Fill a folder with ``base``, ``home``, the exported bundle, and ``site.adapter``."""
    write_keys(folder, "key", ec.generate_private_key(ec.SECP256R1()))
    traced = once_in(traces)
    plain, model = model_of(kind, PLAIN_CLIP), model_of(kind, PARTS)
    export(plain, kind, NO_ADAPTER, folder / "base", traced, variants=base_variants)
    onto = AdapterBase.open(folder / "base")
    export(
        model, kind, "1" * 64, folder / "home", traced,
        variants=variants, onto=onto, sign=folder / "key.pem",
    )  # fmt: skip
    write_adapter(folder / "home", onto, model, "float16", folder / "site.adapter")


@pytest.fixture(scope="session")
def of_clip(shared_folder):
    """The folder of a CLIP, made once a session."""
    folder = shared_folder / "adapter"
    with FileLock(f"{folder}.lock"):
        if not (folder / "site.adapter").exists():
            folder.mkdir(exist_ok=True)
            exported("clip", folder, shared_folder / "traces", ("int8",), ALL)
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


def test_so_is_that_of_pe_core_with_rotary_embeddings_and_attention_pooling(
    shared_folder, tmp_path, monkeypatch
):
    know_toy_towers(monkeypatch)
    exported("pecore", tmp_path, shared_folder / "traces", (), ("int8-fp16",))
    apply_adapter(tmp_path / "site.adapter", tmp_path / "base", tmp_path / "bundle")
    assert snapshot(tmp_path / "bundle") == snapshot(tmp_path / "home")


def test_command_lines_apply_describe_and_remove(site, monkeypatch):
    into = ("-b", "base", "-o", "bundle", "--json")
    refusal(run_rt("apply", *into), 2, "adapter_missing")
    refusal(run_rt("apply", "site.adapter", "--remove", *into), 2, "adapter_and_remove")
    refusal(run_rt("apply", "gone.adapter", *into), 3, "no_adapter")
    monkeypatch.setenv("UPPERSON_TRUST", "")
    assert run_rt("apply", "site.adapter", *into).exit_code == 2
    monkeypatch.setenv("UPPERSON_TRUST", "key.pub")
    applied = run_rt_json("apply", "site.adapter", *into[:-1])
    refusal(run_rt("apply", "--remove", *into), 6, "not_signed")
    monkeypatch.delenv("UPPERSON_TRUST")
    assert (applied["name"], set(applied["variants"])) == ("site", {"fp32", *ALL})
    assert applied == run_rt_json("info", "-b", "bundle")
    assert applied["signed_by"] is not None
    assert applied["adapter_sha256"] == "1" * 64
    shown = run_rt("info", "-b", "bundle").stdout.splitlines()
    assert [line.split()[:2] for line in shown[1:3]] == [["site", "site"], ["base", "clip,"]]
    removed = run_rt_json("apply", "--remove", *into[:-1])
    assert (removed["adapter_sha256"], removed["signed_by"]) == (None, None)


def test_the_adapter_is_small_and_holds_what_was_trained(site):
    with AdapterFile("site.adapter") as file:
        trained = [v for tower in ("image", "text") for v in file.trained(tower).values()]
        literal = sum(len(file.graph(name)) for name in file.manifest.graphs)
    model = model_of("clip", PARTS)
    wanted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.size for value in trained) == wanted
    assert {value.dtype for value in trained} == {np.dtype(np.float16)}
    assert literal < sum(path.stat().st_size for path in (site / "home").glob("*.onnx")) / 4


# --- What is refused: the bundle that is there stays


TRAINED = "trained.safetensors"


def entry(name, content):
    """Replace an entry of an adapter file, by what a function makes of it; None takes it away."""

    def change(path):
        with zipfile.ZipFile(path) as archive:
            entries = {one: archive.read(one) for one in archive.namelist()}
        entries[name] = content(entries[name]) if callable(content) else content
        with zipfile.ZipFile(path, "w") as archive:
            for one, data in entries.items():
                if data is not None:
                    archive.writestr(one, data)

    return change


def manifest(change):
    def changed(data):
        content = json.loads(data)
        change(content)
        return json.dumps(content)

    return entry("adapter.json", changed)


def tensor(number):
    """Give a trained tensor another first number."""

    def changed(data):
        tensors = {name: value.copy() for name, value in read_tensors(data).items()}
        tensors["image.blocks.0.lora.key.up"][0, 0] = number
        return pack_tensors(tensors)

    return entry(TRAINED, changed)


def overlapping():
    data = pack_tensors({"image.a": np.zeros(8, np.float32)})
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    text = json.dumps(header | {"image.b": header["image.a"]}).encode()
    return len(text).to_bytes(8, "little") + text + data[start:]


def without_name(name):
    """Sign all files but one, with the trusted key."""

    def signed(data):
        files = files_of_signature(data, None, "it")
        del files[name]
        return sign_files(files, read_private_key("key.pem"), "site")

    return entry("files/model.sig", signed)


def parts_of(content):
    return content["graphs"]["image.int8.onnx"]["parts"]


FILES = {
    "adapter_damaged": (
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\5\6" + bytes(18)),
        entry(TRAINED, None),
        entry(TRAINED, b"\xff" * 40),
        entry(TRAINED, (1 << 40).to_bytes(8, "little")),
        entry(TRAINED, bytes([2, *bytes(7)]) + b"[]"),
        entry(TRAINED, overlapping()),
        entry("graphs/image.int8.onnx", None),
        entry("adapter.json", b"[" * 9_000_000),
        entry("files/canaries.npz", b"other"),
        entry("files/.git/config", b"[core]"),
        entry("more.txt", b"nothing names it"),
        entry("graphs/more.onnx", b"nothing names it"),
        entry("graphs/", b""),
        entry("../more.txt", b"nothing names it"),
        manifest(lambda content: content.pop("base")),
        manifest(lambda content: parts_of(content).insert(0, parts_of(content)[0])),
    ),
    "weight_not_finite": (tensor(np.nan),),
    "signature_malformed": (entry("files/model.sig", b"{}"), entry("files/model.sig", b"\xff")),
    "file_changed": (
        entry("files/README.md", b"other"),
        without_name("README.md"),
    ),
    "graph_differs": (
        tensor(9),
        entry("graphs/image.fp32.onnx", b"other"),
        manifest(lambda content: parts_of(content).pop(len(parts_of(content)) // 2)),
    ),
    "weight_unfit": (
        manifest(lambda c: c["towers"]["text"]["frozen"]["embedding"].update(offset=1 << 40)),
        entry(TRAINED, pack_tensors({})),
    ),
    "path_outside": (manifest(lambda content: content["copied"].append("../tokenizer.json")),),
    "version_unknown": (manifest(lambda content: content.update(schema_version=2)),),
}


def test_a_damaged_or_changed_adapter_leaves_the_bundle(site):
    shutil.copytree("base", "bundle")
    adapter = site / "site.adapter"
    whole = adapter.read_bytes()
    for code, change in ((code, change) for code, all_ in FILES.items() for change in all_):
        adapter.write_bytes(whole)
        change(adapter)
        before = snapshot(site)
        with refused(code):
            apply_adapter("site.adapter", "base", "bundle")
        assert snapshot(site) == before


@pytest.mark.parametrize("trust", [None, "key.pub"])
@pytest.mark.parametrize("content", [b"{}", b"\xff"])
def test_a_malformed_signature_is_refused_before_a_folder_is_made(site, content, trust):
    entry("files/model.sig", content)(site / "site.adapter")
    (site / "base" / "model.sig").write_bytes(content)
    before = snapshot(site)
    given = ("-b", "base", "-o", "new/bundle", *(("--trust", trust) if trust else ()), "--json")
    for what in ("site.adapter", "--remove"):
        refusal(run_rt("apply", what, *given), 6, "signature_malformed")
    assert snapshot(site) == before
    assert not (site / "new").exists()


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graph_of_each_tower_must_be_that_of_the_base(site, tower):
    place = site / "base" / "bundle.json"
    content = json.loads(place.read_text())
    content["variants"]["fp32"][tower]["sha256"] = "0" * 64
    place.write_text(json.dumps(content))
    with refused("adapter_of_other_base", IntegrityError, tower=tower, found="0" * 64):
        apply_adapter("site.adapter", "base", "bundle")
    assert not (site / "bundle").exists()


def changed_graph(site):
    graph = site / "base" / "image.fp32.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)


@pytest.mark.parametrize(
    ("code", "error", "change"),
    [
        ("adapter_of_other_base", IntegrityError, lambda s: (
            shutil.rmtree(s / "base"), shutil.copytree(s / "home", s / "base"))),
        ("checksum_differs", IntegrityError, changed_graph),
        ("no_bundle", InputError, lambda site: shutil.rmtree(site / "base")),
        ("no_adapter", InputError, lambda site: (site / "site.adapter").unlink()),
        ("unowned_files", InputError, lambda site: (site / "bundle" / "mine.txt").touch()),
        ("output_is_base", UsageError, lambda site: (
            shutil.rmtree(site / "bundle"), (site / "bundle").symlink_to("base"))),
    ],
)  # fmt: skip
def test_another_base_or_place_is_refused(site, code, error, change):
    shutil.copytree("base", "bundle")
    change(site)
    before = snapshot(site)
    with refused(code, error):
        apply_adapter("site.adapter", "base", "bundle")
    assert snapshot(site) == before


def test_a_signature_is_asked_for_and_checked(site):
    write_keys(site, "other", ec.generate_private_key(ec.SECP256R1()))
    with refused("signature_wrong", IntegrityError):
        apply_adapter("site.adapter", "base", "bundle", trust="other.pub")
    whole = (site / "site.adapter").read_bytes()
    for change in (entry("files/README.md", b"other"), without_name("README.md")):
        change(site / "site.adapter")
        with refused("file_changed", IntegrityError):
            apply_adapter("site.adapter", "base", "bundle", trust="key.pub")
        (site / "site.adapter").write_bytes(whole)
    entry("files/model.sig", None)(site / "site.adapter")
    with refused("adapter_unsigned", IntegrityError):
        apply_adapter("site.adapter", "base", "bundle", trust="key.pub")
    assert not (site / "bundle").exists()
    apply_adapter("site.adapter", "base", "bundle")


def as_if_of(bundle, **changes):
    """Let a bundle's manifest name another model."""
    manifest = read_manifest(bundle)
    model = replace(manifest.model, **changes)
    fingerprint = space_fingerprint(model, manifest.image, manifest.text)
    changed = replace(manifest, model=model, fingerprint=fingerprint)
    (bundle / "bundle.json").write_text(changed.to_json(), "utf-8")


@pytest.mark.parametrize("change", [{"name": "another site"}, {"base_sha256": "5" * 64}])
def test_the_bundle_of_another_site_or_base_is_replaced_only_by_force(site, change):
    shutil.copytree("home", "bundle")
    as_if_of(site / "bundle", **change)
    before = snapshot(site)
    into = ("-b", "base", "-o", "bundle")
    refusal(run_rt("apply", "site.adapter", *into, "--json"), 3, "bundle_of_other_model")
    if "base_sha256" in change:
        refusal(run_rt("apply", "--remove", *into, "--json"), 3, "bundle_of_other_model")
    assert snapshot(site) == before
    assert run_rt("apply", "site.adapter", *into, "--force").exit_code == 0
    assert snapshot(site / "bundle") == snapshot(site / "home")
    as_if_of(site / "bundle", adapter_sha256="7" * 64)  # An earlier one of the site.
    apply_adapter("site.adapter", "base", "bundle")
    assert snapshot(site / "bundle") == snapshot(site / "home")


def test_an_export_replaces_the_bundle_of_another_model_only_by_force(site):
    """A damaged bundle of the same model is replaced, too."""
    replace_it = partial(
        export, model_of("clip", PLAIN_CLIP), "clip", NO_ADAPTER, traced=as_in(site / "base")
    )
    place = shutil.copytree("base", "bundle")
    (site / "bundle/image.fp32.onnx").write_bytes(b"damaged")
    replace_it(site / place, variants=())
    assert Bundle.open(place).check_golden_samples()
    as_if_of(site / place, adapter_sha256="7" * 64)
    before = snapshot(site)
    with refused("bundle_of_other_model", InputError):
        replace_it(site / place, variants=())
    assert snapshot(site) == before
    replace_it(site / place, variants=(), force=True)
    assert read_manifest(site / place).model.adapter_sha256 == NO_ADAPTER


def test_base_and_output_are_apart(site):
    before = snapshot(site)
    for output in ("base", "base/site", "."):
        for made, *given in ((apply_adapter, "site.adapter", "base"), (restore_base, "base")):
            with refused("output_is_base", UsageError):
                made(*given, output)
    with refused("base_has_adapter", UsageError):
        restore_base("home", "bundle")
    assert snapshot(site) == before


def test_a_full_disk_leaves_the_bundle(site, monkeypatch):
    shutil.copytree("base", "bundle")
    before = snapshot(site)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(apply, "graph_bytes", full)
    with refused("disk_full", InputError):
        apply_adapter("site.adapter", "base", "bundle")
    assert snapshot(site) == before


def test_killed_at_any_moment_the_earlier_bundle_serves(site):
    """Kill at moments spread over a whole run; afterwards there is one bundle or the other."""
    shutil.copytree("base", "bundle")
    bundles = [snapshot(site / "base"), snapshot(site / "home")]
    start = time.monotonic()
    applying = multiprocessing.get_context("fork")
    once = applying.Process(target=apply_adapter, args=("site.adapter", "base", "once"))
    once.start()
    once.join(120)
    assert once.exitcode == 0
    whole_s = time.monotonic() - start
    for share in np.linspace(0.05, 1.1, 5):
        process = applying.Process(target=apply_adapter, args=("site.adapter", "base", "bundle"))
        process.start()
        process.join(share * whole_s)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        assert snapshot(site / "bundle") in bundles
    assert Bundle.open(site / "bundle").check_golden_samples()
    restore_base("base", "bundle")
    assert {path.name for path in site.iterdir() if path.name.startswith(".")} == set()


def test_two_at_once_leave_one_whole_bundle(site):
    with ThreadPoolExecutor(2) as pool:
        applied = pool.submit(apply_adapter, "site.adapter", "base", "bundle")
        pool.submit(restore_base, "base", "bundle").result()
        applied.result()
    assert snapshot(site / "bundle") in (snapshot(site / "base"), snapshot(site / "home"))


# --- Export


def test_a_run_over_another_base_and_a_base_with_an_adapter_are_refused(site):
    onto = AdapterBase.open(site / "base")
    other = model_of("clip", PARTS, seed=1)
    with refused("adapter_of_other_base", IntegrityError):
        export(
            other, "clip", "2" * 64, site / "other", as_in(site / "home"), variants=(), onto=onto
        )
    with refused("base_has_adapter", UsageError):
        AdapterBase.open(site / "home")
    assert not (site / "other").exists()


def test_float32_tensors_are_stored_as_they_are(site):
    onto = AdapterBase.open(site / "base")
    model = UPPerson(toy_base("clip"), PARTS, SIZE, STATISTICS).eval()
    disturb(model)
    export(model, "clip", "3" * 64, site / "exact", as_in(site / "home"), variants=(), onto=onto)
    with refused("trained_beyond_type", InputError):
        write_adapter(site / "exact", onto, model, "float16", site / "exact.adapter")
    write_adapter(site / "exact", onto, model, "float32", site / "exact.adapter")
    apply_adapter("exact.adapter", "base", "bundle")
    assert snapshot(site / "bundle") == snapshot(site / "exact")


# --- Folding


def test_rows_of_new_words_are_added_to_the_embedding():
    frozen = {"embedding": np.arange(12, dtype=np.float32).reshape(4, 3)}
    trained = {
        "token_embedding.ids": np.array([2, 0], np.int32),
        "token_embedding.rows": np.array([[1, 2, 3], [0.5, 0, 0]], np.float16),
    }
    folded = fold_trained(frozen, trained, heads=1)
    expected = frozen["embedding"] + [[0.5, 0, 0], [0, 0, 0], [1, 2, 3], [0, 0, 0]]
    np.testing.assert_array_equal(folded["embedding"], expected.astype(np.float32))
    trained["token_embedding.ids"] = np.array([2, 4], np.int32)
    with refused("weight_unfit", InputError):
        fold_trained(frozen, trained, heads=1)


def test_low_rank_updates_are_summed_in_one_order():
    """A product of a library may add in another order, and differ in the last digit."""
    rng = np.random.default_rng(0)
    frozen = {"blocks.0.attention.qkv.weight": rng.standard_normal((64, 192), np.float32)}
    trained = {}
    for part in ("key", "value"):
        trained[f"blocks.0.lora.{part}.up"] = rng.standard_normal((64, 32), np.float32)
        trained[f"blocks.0.lora.{part}.down"] = rng.standard_normal((32, 64), np.float32)
        trained[f"blocks.0.lora.{part}.scale"] = np.float32(0.7)
    (folded,) = fold_trained(frozen, trained, heads=1).values()
    expected = frozen["blocks.0.attention.qkv.weight"].astype(np.float64)
    for part, start in (("key", 64), ("value", 128)):
        up, down = (
            trained[f"blocks.0.lora.{part}.{name}"].astype(float) for name in ("up", "down")
        )
        exact = [[math.fsum(up[o] * down[:, i]) for o in range(64)] for i in range(64)]
        expected[:, start : start + 64] += np.float64(np.float32(0.7)) * np.array(exact)
    np.testing.assert_array_equal(folded[:, :64], expected[:, :64])
    np.testing.assert_allclose(folded, expected.astype(np.float32), rtol=2e-7)
