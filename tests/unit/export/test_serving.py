"""Server formats: what the files say, where it comes from, and that the graphs still agree."""

import configparser
import ctypes
import json
import queue
import re
import sys
from functools import reduce
from types import SimpleNamespace as Names

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto

import upperson_rt
from tests.helpers import toy_bundle
from tests.helpers.invoke import snapshot
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from tests.helpers.toy_clip import toy_pixels
from tests.helpers.toy_graphs import proto_of, toy_graph
from upperson_export.graphs import build_variant
from upperson_export.serving import (
    BATCH_SIZE,
    CONFIG,
    LENGTH_STEP,
    RECORD,
    planar_float_input,
    write_deepstream,
    write_triton,
)
from upperson_rt.bundle import read_manifest
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.manifest import parse_manifest

each_format = pytest.mark.parametrize("write", [write_triton, write_deepstream])

TEXTS = ["a man in red", "a woman in a blue coat", "green"]


@pytest.fixture
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


@pytest.fixture
def kserve():
    """The stand-in server; needs Triton's own protobuf definitions."""
    try:
        from tests.helpers import kserve_server
    except (ImportError, RuntimeError) as error:  # tritonclient's word for an absent dependency.
        pytest.skip(f"needs  pip install 'tritonclient[grpc]'  ({error})")
    return kserve_server


def edit_manifest(bundle, change):
    """Change `bundle.json` and bring its fingerprint in line."""
    content = json.loads((bundle / "bundle.json").read_text("utf-8"))
    change(content)
    content["fingerprint"] = "sha256:" + "0" * 64
    try:
        parse_manifest(content)
    except IntegrityError as error:  # It tells the right one.
        content["fingerprint"] = re.findall(r"sha256:[0-9a-f]{64}", str(error))[-1]
    (bundle / "bundle.json").write_text(json.dumps(content), "utf-8")


def rename_variant(bundle, old, new):
    with np.load(bundle / "canaries.npz") as archive:
        arrays = {name.replace(f".{old}", f".{new}"): array for name, array in archive.items()}
    np.savez(bundle / "canaries.npz", **arrays)
    replace_in_bundle(bundle, "canaries.npz", (bundle / "canaries.npz").read_bytes())

    def change(content):
        content["variants"][new] = content["variants"].pop(old) | {"precision": new}
        content["default_variant"] = new

    edit_manifest(bundle, change)


def python_in(readme):
    (block,) = re.findall(r"^```python\n(.*?)^```", readme.read_text("utf-8"), re.M | re.S)
    return block


def run(model, name, array):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: array})[0]


# --- Triton


def test_a_model_repository_holds_both_towers_and_configs_that_fit_them(bundle, tmp_path, kserve):
    written = write_triton(bundle, tmp_path / "models")
    manifest = read_manifest(bundle)
    expected = ["README.md", "tokenizer.json"]
    types = {"TYPE_UINT8": TensorProto.UINT8, "TYPE_INT32": TensorProto.INT32}
    for tower in ("image", "text"):
        expected += [f"toy_{tower}/1/model.onnx", f"toy_{tower}/config.pbtxt"]
        folder = tmp_path / "models" / f"toy_{tower}"
        served = (folder / "1/model.onnx").read_bytes()
        assert served == (bundle / f"{tower}.fp32.onnx").read_bytes()
        config = kserve.read_config(folder / "config.pbtxt")
        assert (config.name, config.backend) == (folder.name, "onnxruntime")
        assert config.max_batch_size > 1
        assert config.HasField("dynamic_batching")
        (cuda,) = config.optimization.execution_accelerators.gpu_execution_accelerator
        assert (cuda.name, dict(cuda.parameters)) == ("cuda", {"use_tf32": "0"})
        assert [group.count for group in config.instance_group] == [1]
        graph = onnx.load_from_string(served).graph
        (given,), (result,) = config.input, config.output
        kinds = type(given).DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
        tensor = graph.input[0].type.tensor_type
        assert given.name == graph.input[0].name
        assert types[kinds[given.data_type].name] == tensor.elem_type
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
        assert list(given.dims) == dims[1:]
        assert result.name == graph.output[0].name
        assert kinds[result.data_type].name == "TYPE_FP32"
        assert list(result.dims) == [toy_bundle.EMBED_DIM]
        assert {key: value.string_value for key, value in config.parameters.items()} == {
            "fingerprint": manifest.fingerprint, "variant": "fp32", "precision": "fp32",
            "onnx_sha256": manifest.variants["fp32"].file(tower).sha256,
        }  # fmt: skip
    assert list(written.files) == sorted(expected)
    assert sorted(snapshot(tmp_path / "models")) == sorted([*expected, RECORD])
    tokenizer = (tmp_path / "models/tokenizer.json").read_bytes()
    assert tokenizer == (bundle / "tokenizer.json").read_bytes()


def test_the_readmes_client_gets_the_encoders_embeddings_or_stops(
    bundle, tmp_path, kserve, monkeypatch
):
    write_triton(bundle, tmp_path / "models")
    monkeypatch.chdir(tmp_path / "models")
    picture = toy_bundle.draw_person(tmp_path / "red.png", "red")
    code = python_in(tmp_path / "models" / "README.md")
    with kserve.serve(tmp_path / "models") as (address, requests):
        client = {}
        exec(code.replace("localhost:8001", address), client)
        texts = client["embed_texts"](TEXTS)
        images = client["embed_images"]([picture, picture])
        client["client"].close()
    encoder = upperson_rt.open(bundle, "fp32", threads=1)
    np.testing.assert_allclose(texts, encoder.encode_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(images, encoder.encode_images([picture] * 2), atol=1e-6)
    assert np.argmax(texts @ images[0]) == 0, "red is what the picture shows"
    # Padded to the step, but not beyond the context, whatever the sentences' own length is.
    assert requests[0] == ("toy_text", (3, min(LENGTH_STEP, toy_bundle.CONTEXT_LENGTH)))
    other = write_triton(make_toy_bundle(tmp_path / "other", seed=1), tmp_path / "others")
    with (
        kserve.serve(other.folder) as (address, _),
        pytest.raises(SystemExit, match=other.fingerprint),  # Another space.
    ):
        exec(code.replace("localhost:8001", address), {})


# --- DeepStream


def nvinfer_config(folder):
    parser = configparser.ConfigParser()
    parser.read(folder / CONFIG, "utf-8")
    assert parser.sections() == ["property"]
    return dict(parser["property"])


def test_nvinfer_gets_the_tower_and_values_that_fit_it(bundle, tmp_path):
    written = write_deepstream(bundle, tmp_path / "ds")
    assert written.files == ("README.md", CONFIG, "image.fp32.planar.onnx")
    config = nvinfer_config(written.folder)
    assert config.items() >= {
        "process-mode": "2", "network-type": "100", "output-tensor-meta": "1",
        "model-color-format": "0", "net-scale-factor": "1.0", "maintain-aspect-ratio": "0",
    }.items()  # fmt: skip
    assert config["batch-size"] == str(BATCH_SIZE)
    assert "onnx-file" not in config, "nvinfer would build an engine with types of its own"
    assert "offsets" not in config
    graph = onnx.load(written.folder / "image.fp32.planar.onnx").graph
    dims = [dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim]
    assert config["infer-dims"] == ";".join(map(str, dims[1:]))
    least = int(config["input-object-min-height"]), int(config["input-object-min-width"])
    assert all(16 * a >= n > 16 * (a - 1) for a, n in zip(least, dims[2:], strict=True))
    assert config["output-blob-names"] == graph.output[0].name
    readme = (written.folder / "README.md").read_text("utf-8")
    for option in ("--stronglyTyped --noTF32 ", f"--saveEngine={config['model-engine-file']} "):
        assert option in readme


def chain(*elements):
    """A list as pyds has it: elements with `data` and the `next` one."""
    return reduce(lambda later, data: Names(data=data, next=later), reversed(elements), None)


def fake_deepstream(monkeypatch, frame):
    """Stand in for pyds and gi with the few names that the probe uses."""
    kinds = ("NvDsUserMeta", "NvDsInferTensorMeta", "NvDsObjectMeta", "NvDsFrameMeta")
    pyds = Names(
        **dict.fromkeys(kinds, Names(cast=lambda value: value)),
        NvDsMetaType=Names(NVDSINFER_TENSOR_OUTPUT_META=12),
        get_nvds_LayerInfo=lambda tensor, index: tensor.layers[index],
        get_ptr=lambda value: value,
        gst_buffer_get_nvds_batch_meta=lambda _: Names(frame_meta_list=chain(frame)),
    )
    repository = Names(Gst=Names(PadProbeReturn=Names(OK="ok")))
    modules = {"pyds": pyds, "gi": Names(repository=repository), "gi.repository": repository}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)


def detected(vector, number, gie_id=2):
    """A person with a box and an embedding, as nvinfer leaves it behind."""
    buffer = (ctypes.c_float * len(vector))(*vector)
    layer = Names(buffer=ctypes.addressof(buffer), kept=buffer)
    tensor = Names(unique_id=gie_id, layers=[layer])
    user = Names(base_meta=Names(meta_type=12), user_meta_data=tensor)
    box = Names(left=10.6, top=20.2, width=30.0, height=90.0)
    return Names(obj_user_meta_list=chain(user), object_id=number, rect_params=box)


def test_the_readmes_probe_fills_a_gallery(bundle, tmp_path, monkeypatch):
    written = write_deepstream(bundle, tmp_path / "ds")
    encoder = upperson_rt.open(bundle, "fp32", threads=1)
    pictures = [
        toy_bundle.draw_person(tmp_path / f"{colour}.png", colour) for colour in ("red", "blue")
    ]
    # Not quite of unit length, as float16 leaves them.
    red, blue = encoder.encode_images(pictures) * np.float32(1.01)
    people = chain(
        detected(red, 7),
        detected(blue, 8),
        detected(blue, 9, gie_id=1),  # Of another nvinfer.
        detected(blue, 2**64 - 1),  # Without a number.
    )
    frame = Names(
        obj_meta_list=people, source_id=3, frame_num=5, ntp_timestamp=1_700_000_000 * 10**9
    )
    fake_deepstream(monkeypatch, frame)
    code = python_in(written.folder / "README.md")
    code, thread = code.rsplit("\n", 2)[0], code.rsplit("\n", 2)[1]
    assert thread.startswith("threading.Thread(target=write_gallery")
    probe = {}
    exec(code, probe)
    pad_info = Names(get_buffer=lambda: 1)
    assert probe["probe"](None, pad_info, None) == "ok"
    probe["people"].put(None)
    probe["write_gallery"](tmp_path / "gallery")
    with upperson_rt.Gallery.open(
        tmp_path / "gallery", encoder.fingerprint, encoder.embed_dim
    ) as gallery:
        assert gallery.count() == 2
        (best, _) = upperson_rt.Retriever(encoder, gallery).query("a man in red", k=2)
    item = best.item
    assert (item.track, item.camera, item.time) == ("7", "3", 1_700_000_000)
    assert item.box == (10, 20, 40, 110)
    probe["people"] = queue.Queue(maxsize=1)
    probe["probe"](None, pad_info, None)
    assert probe["dropped"] == 1, "a full queue drops, and does not hold the pipeline up"


# --- The planar graph


@pytest.fixture
def exported(toy_graphs):
    """The real image tower of the toy model."""
    return proto_of(toy_graph("image"))


def test_the_planar_graph_differs_at_its_input_alone_and_gives_the_same_bits(exported):
    before = exported.SerializeToString()
    adapted = planar_float_input(exported)
    assert exported.SerializeToString() == before
    pixels = toy_pixels(17).numpy()
    planar = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    for rows in (slice(1), slice(None)):
        np.testing.assert_array_equal(
            run(adapted, "image", np.ascontiguousarray(planar[rows])),
            run(exported, "image", pixels[rows]),
        )
    assert adapted.graph.output == exported.graph.output
    assert adapted.graph.initializer == exported.graph.initializer
    first, *rest = adapted.graph.node
    assert first.op_type == "Transpose"
    assert [n.name for n in adapted.graph.node if "image" in n.input] == [first.name]
    names = [node.name for node in exported.graph.node if node.op_type != "Cast"]
    assert [node.name for node in rest] == names, "only the Cast of the pixels is removed"
    typed = planar_float_input(ir.to_proto(build_variant(toy_graph("image"), "fp16")))
    assert [node.op_type for node in typed.graph.node[:2]] == ["Transpose", "Cast"]
    with refused("input_not_pixels", IntegrityError):
        planar_float_input(adapted)


def test_every_constant_comes_from_the_manifest(tmp_path, monkeypatch):
    sizes = {"HEIGHT_PX": 48, "WIDTH_PX": 16, "EMBED_DIM": 20, "CONTEXT_LENGTH": 9}
    for name, value in sizes.items():
        monkeypatch.setattr(toy_bundle, name, value)
    bundle = make_toy_bundle(tmp_path / "bundle")
    models = write_triton(bundle, tmp_path / "models").folder
    folder = write_deepstream(bundle, tmp_path / "ds").folder
    for file, constants in (
        (models / "toy_image/config.pbtxt", ["dims: [ 48, 16, 3 ]", "dims: [ 20 ]"]),
        (models / "README.md", ['Tokenizer.from_file("tokenizer.json", 9)', "48, 16)"]),
        (folder / "README.md", ["EMBED_DIM = 20", "x3x48x16"]),
        (folder / CONFIG, ["infer-dims=3;48;16"]),
    ):
        text = file.read_text("utf-8")
        assert [one for one in constants if one not in text] == []


# --- Both formats


@each_format
def test_gpu_servers_get_fp16_else_fp32_or_what_is_named(bundle, tmp_path, write):
    assert write(bundle, tmp_path / "a").variant == "fp32", "int8, its default, is for processors"
    assert write(bundle, tmp_path / "b", "int8").variant == "int8"
    rename_variant(bundle, "int8", "fp16")
    written = write(bundle, tmp_path / "c")
    assert written.variant == "fp16"
    record = json.loads((tmp_path / "c" / RECORD).read_text("utf-8"))
    assert (record["variant"], record["precision"]) == ("fp16", "fp16")
    with pytest.raises(UsageError):
        write(bundle, tmp_path / "d", "fp8")

    other = make_toy_bundle(tmp_path / "other")
    edit_manifest(other, lambda content: content["variants"].pop("fp32"))
    with refused("no_variant_for_servers", UsageError, path=other):
        write(other, tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["../../up", 'a"b\n}', ".."])
def test_a_models_name_stays_inside_the_folder(bundle, tmp_path, name, kserve):
    edit_manifest(bundle, lambda content: content["model"].update(name=name))
    folder = write_triton(bundle, tmp_path / "out" / "models").folder
    models = [path for path in folder.iterdir() if path.is_dir()]
    assert len(models) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["models"]
    for model in models:
        assert re.fullmatch(r"[A-Za-z0-9._-]+_(image|text)", model.name)
        assert kserve.read_config(model / "config.pbtxt").name == model.name


def refuse_to_write(write, bundle, output):
    before = snapshot(output)
    with pytest.raises(InputError):
        write(bundle, output)
    assert snapshot(output) == before


@each_format
def test_only_an_unchanged_earlier_result_is_replaced(bundle, tmp_path, write, monkeypatch):
    output = tmp_path / "out"
    first = write(bundle, output)
    second = write(make_toy_bundle(tmp_path / "other", seed=1), output)
    assert second.fingerprint != first.fingerprint
    assert json.loads((output / RECORD).read_text("utf-8"))["fingerprint"] == second.fingerprint
    readme = (output / "README.md").read_bytes()
    (output / "mine.engine").write_text("took an hour")
    refuse_to_write(write, bundle, output)
    (output / "mine.engine").unlink()
    (output / "README.md").write_text("my notes")
    refuse_to_write(write, bundle, output)
    (tmp_path / "readme").write_bytes(readme)
    (output / "README.md").unlink()
    (output / "README.md").symlink_to(tmp_path / "readme")
    refuse_to_write(write, bundle, output)
    (output / "README.md").unlink()
    (output / "README.md").write_bytes(readme)
    refuse_to_write(write_triton if write is write_deepstream else write_deepstream, bundle, output)
    for content in ("", "[]", "{}", '{"format": "triton", "files": 3}'):
        (tmp_path / "unowned").mkdir(exist_ok=True)
        (tmp_path / "unowned" / RECORD).write_text(content, "utf-8")
        refuse_to_write(write, bundle, tmp_path / "unowned")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("upperson_export.serving.write_serving_record", full_disk)
        refuse_to_write(write, bundle, output)
    write(bundle, output)


@each_format
def test_a_graph_that_breaks_the_contract_is_refused(bundle, tmp_path, write):
    def with_file(content):
        replace_in_bundle(bundle, "image.fp32.onnx", content)
        with pytest.raises(IntegrityError) as found:
            write(bundle, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return found.value.code

    model = onnx.load(bundle / "image.fp32.onnx")
    model.graph.output[0].name = model.graph.node[-1].output[0] = "features"
    with_file(model.SerializeToString())  # The runtime refuses it first.
    model.graph.output[0].name = model.graph.node[-1].output[0] = "image_embeds"
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert with_file(model.SerializeToString()) == "graph_not_as_manifest"
    with_file(b"\xffgarbage")
    (bundle / "image.fp32.onnx").write_bytes(b"\xffgarbled")  # As long, and another hash.
    with refused("checksum_differs", IntegrityError):
        write(bundle, tmp_path / "out")
