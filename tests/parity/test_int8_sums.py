"""int8 gives the same numbers on every CPU: CPUs without VNNI against exact arithmetic.

One Linear with the largest weights and inputs, quantized with and without a limit for pairs of
neighbours. Without the limit such CPUs saturate, which shows that the test can fail.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser

from benchmarks import avx2
from tests.helpers.command_line import ROOT, run_code
from tests.helpers.toy_graphs import TOWERS, amax_of, min_cosine, run_graph, toy_graph, toy_inputs
from upperson_bench.processes import child_environment
from upperson_export.passes.linears import QuantizeLinears, TransposePacked
from upperson_export.variants import VARIANTS
from upperson_machine.int8 import PAIR_LIMIT, int8_sums_saturate
from upperson_onnxruntime import backend as onnxruntime_backend
from upperson_onnxruntime.backend import OnnxRuntimeBackend, session_options
from upperson_openvino import backend as openvino_backend
from upperson_openvino.backend import OpenVinoBackend
from upperson_rt.errors import BackendError

INPUTS, OUTPUTS, ROWS = 192, 48, 8
HASWELL = shutil.which("qemu-x86_64")

RUN_ONNXRUNTIME = """
import sys, numpy as np, onnxruntime as ort
x = np.load(sys.argv[1])
for path in sys.argv[2:]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    np.save(path + ".npy", session.run(None, {"x": x})[0])

from upperson_onnxruntime import backend
backend.int8_sums_saturate = lambda: True  # /proc/cpuinfo is that of the real processor.
for path in sys.argv[2:]:
    np.save(path + ".ours.npy", backend.OnnxRuntimeBackend(path).run({"x": x})["y"])
"""
RUN_OPENVINO = """
import sys, numpy as np, openvino
x = np.load(sys.argv[1])
for path in sys.argv[2:]:
    model = openvino.Core().read_model(path)
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.save(path + ".npy", compiled({0: x})[0])
"""


@pytest.fixture
def openvino():
    pytest.importorskip("openvino", reason="openvino is not installed: extra 'cpu'")


def run_openvino(x, *files):
    """Return what each of the files gives in a process of its own."""
    done = run_code(RUN_OPENVINO, x, *files)
    assert done.returncode == 0, done.stderr
    return [np.load(f"{file}.npy") for file in files]


def run_node_by_node(model, inputs):
    """Run a graph in ONNX Runtime without any of its optimisations."""
    options = session_options(ort, 1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]


def with_exact_products(path):
    """Return an int8 graph as ONNX Runtime optimises it, products summed in float64; and those.

    All else, the order of each rounding included, is as it would run: what differs between the two
    is what its kernels for int8 get wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(ort, 1)
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        model = ir.from_proto(onnx.load(options.optimized_model_filepath))
    products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    for product in products:
        sum_in_float64(model.graph, product)
    return model, len(products)


def sum_in_float64(graph, product):
    """Replace the node: sums of whole numbers below 2**53 are exact in float64."""
    a, b, a_scale, b_scale, a_zero, b_zero, *bias = product.inputs
    tape = ir.tape.Tape()

    def whole(value, zero):
        numbers, zeros = (tape.op("Cast", [x], {"to": ir.DataType.DOUBLE}) for x in (value, zero))
        return tape.op("Sub", [numbers, zeros])

    sums = tape.op("MatMul", [whole(a, a_zero), whole(b, b_zero)])
    sums = tape.op("Cast", [sums], {"to": ir.DataType.FLOAT})
    result = tape.op("Mul", [sums, tape.op("Mul", [a_scale, b_scale])])
    if bias:
        result = tape.op("Add", [result, bias[0]])
    graph.insert_before(product, tape.nodes)
    ir.convenience.replace_all_uses_with(product.outputs[0], result)
    graph.remove(product, safe=True)


def linear(weight_IO, pair_limit):
    proto = parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 19]>
    linear (float[rows, {INPUTS}] x) => (float[rows, {OUTPUTS}] y) {{ y = MatMul(x, weight) }}""")
    proto.graph.node[0].name = "linear"
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight_IO, "weight"))
    model = ir.from_proto(proto)
    QuantizeLinears(["linear"], {"x": 1.0}, pair_limit)(model)
    return model


def exact_product(model, x_RI):
    """The Q/DQ arithmetic of the graph in float64."""
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    steps_RI = np.clip(np.rint(x_RI / values["x.scale"]), -128, 127)
    sums_RO = steps_RI @ values["weight.int8"].astype(np.float64)
    return sums_RO * values["weight.scale"].astype(np.float64) * float(values["x.scale"])


@pytest.fixture(scope="module")
def limited_and_not(tmp_path_factory):
    """Inputs, the file with the limit, the file without it, and what each gives exactly."""
    folder = tmp_path_factory.mktemp("sums")
    rng = np.random.default_rng(0)
    weight_IO = rng.uniform(-1, 1, (INPUTS, OUTPUTS)).astype(np.float32)
    weight_IO[:, 0] = 1  # The worst there is.
    x_RI = rng.choice(np.float32([-1, 0.7, 1]), (ROWS, INPUTS))
    x_RI[0] = 1
    np.save(folder / "x.npy", x_RI)
    models = [linear(weight_IO, limit) for limit in (PAIR_LIMIT, None)]
    files = folder / "limited.onnx", folder / "unlimited.onnx"
    for model, file in zip(models, files, strict=True):
        ir.save(model, file)
    return folder / "x.npy", *files, [exact_product(model, x_RI) for model in models]


def errors(found, exact):
    """Largest error of each product as a part of the largest product."""
    return [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, exact, strict=True)]


def require_saturation(found, exact):
    limited, unlimited = errors(found, exact)
    assert limited < 1e-6
    assert unlimited > 0.05, "the processor does not saturate"


def test_onnxruntime_without_vnni(limited_and_not, tmp_path):
    *given, exact = limited_and_not
    files = [Path(shutil.copy(file, tmp_path)) for file in given]
    interpreter = Path(sys.executable).resolve()  # The emulator starts no link.
    command = [str(interpreter), "-W", "ignore", "-c", RUN_ONNXRUNTIME, *map(str, files)]
    if avx2.missing() is None:
        command = [sys.executable, "-m", "benchmarks.avx2", *command]
    elif HASWELL is not None:
        command = [HASWELL, "-cpu", "Haswell", *command]
    else:
        pytest.skip(f"{avx2.missing()}, and there is no qemu-x86_64: apt install qemu-user")
    options = {"capture_output": True, "text": True, "timeout": 110}
    done = subprocess.run(command, env=child_environment(), cwd=ROOT, **options)
    assert done.returncode == 0, done.stderr
    require_saturation([np.load(f"{file}.npy") for file in files[1:]], exact)
    # The backend computes in float what does not say that it is exact.
    assert max(errors([np.load(f"{file}.ours.npy") for file in files[1:]], exact)) < 1e-6


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_openvino_without_vnni(limited_and_not, tmp_path, monkeypatch, isa):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    *given, exact = limited_and_not
    require_saturation(run_openvino(*(shutil.copy(file, tmp_path) for file in given)), exact)


def int8_tower(kind, inputs, limit):
    graph = toy_graph(kind)
    model = graph.load()
    linears = [linear.node for linear in graph.linears]
    QuantizeLinears(linears, amax_of(graph, inputs), limit)(model)
    TransposePacked()(model)
    return model


@pytest.mark.usefixtures("toy_graphs")
@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_in_onnxruntime_is_exact(kind, tmp_path):
    """Beside its own graph with exact products: all else is rounded in the same order."""
    inputs = toy_inputs(kind, 64)
    ir.save(int8_tower(kind, inputs, PAIR_LIMIT), tmp_path / "int8.onnx")
    exact, products = with_exact_products(tmp_path / "int8.onnx")
    assert products == len(toy_graph(kind).linears)
    expected = run_node_by_node(exact, inputs)
    backend = OnnxRuntimeBackend(tmp_path / "int8.onnx", threads=1)
    (found,) = backend.run({exact.graph.inputs[0].name: inputs}).values()
    assert min_cosine(found, expected) > 0.99995


@pytest.mark.usefixtures("toy_graphs", "openvino")
def test_golden_samples_notice_saturation(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    inputs = toy_inputs("image")
    files, golden = [], []
    for limit in (PAIR_LIMIT, None):
        model = int8_tower("image", inputs, limit)
        files.append(tmp_path / f"{limit}.onnx")
        ir.save(model, files[-1])
        golden.append(run_graph(model, inputs)[0])
    np.save(tmp_path / "x.npy", inputs)
    limited, unlimited = run_openvino(tmp_path / "x.npy", *files)
    floor = VARIANTS["int8"].canary_min_cosine
    assert min_cosine(limited, golden[0]) > max(floor, 0.99995)
    assert min_cosine(unlimited, golden[1]) < floor


def test_only_what_says_that_it_is_exact_is_fused(limited_and_not, monkeypatch, capfd):
    monkeypatch.setattr(onnxruntime_backend, "int8_sums_saturate", lambda: True)
    for file, in_float in zip(limited_and_not[1:3], ("0", "1"), strict=True):
        options = OnnxRuntimeBackend(file, threads=1)._session.get_session_options()
        assert options.get_session_config_entry("session.disable_quant_qdq") == in_float
    assert capfd.readouterr().err == ""  # ONNX Runtime warns of what it finds odd.


@pytest.mark.usefixtures("openvino")
def test_openvino_is_refused_what_would_saturate(limited_and_not, monkeypatch):
    monkeypatch.setattr(openvino_backend, "int8_sums_saturate", lambda: True)
    x, limited, unlimited, exact = limited_and_not
    found = OpenVinoBackend(limited).run({"x": np.load(x)})["y"]
    np.testing.assert_allclose(found, exact[0], rtol=0.02, atol=0.02 * np.abs(exact[0]).max())
    with pytest.raises(BackendError, match="VNNI"):
        OpenVinoBackend(unlimited)


def test_which_processors_saturate(monkeypatch, tmp_path):
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr("upperson_rt.machine._CPUINFO", info)
    for machine, flags, saturates in (
        ("x86_64", None, False),
        ("x86_64", "avx2", True),
        ("AMD64", "avx2 avx512f", True),
        ("x86_64", "avx2 avx_vnni", False),
        ("x86_64", "avx512f avx512_vnni", False),
        ("x86_64", "amx_int8", False),
        ("aarch64", "asimd", False),
    ):
        if flags is not None:
            info.write_text(f"model name : x\nflags : {flags}\n")
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert int8_sums_saturate() is saturates, flags
