"""int8 towers as each library and its kernels run them, beside exact and plain Q/DQ arithmetic.

Sums of int8 products are whole numbers, the same everywhere: ONNX Runtime is compared with its own
graph whose products are exact. What stands between them is rounded, and each library does that in
its own order: a value on the border of two steps takes one or the other by its last bit, and all
that follows moves with it. So plain arithmetic, each node by itself, is compared with itself, too,
its vectors changed in their last bits: no library can be asked to come closer to it.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.kernel_runs import embed
from benchmarks.marks import data_set
from upperson.data.records import read_dataset
from upperson_rt.agreement import compare_embeds
from upperson_rt.bench.processes import call_in_fresh_process, child_environment, said_last
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.towers import TOWERS

NEAR = 0.99995
_BOUNDS = {"AVX2": "AVX2", "AVX-512": "AVX512_CORE", "VNNI": "AVX512_CORE_VNNI"}
"""What oneDNN may use at most, as OpenVINO's kernels are bounded; floats are float32 then."""
_HASWELL = "ONNX Runtime, Haswell emulated"
_EMULATOR = ("qemu-x86_64", "-cpu", "Haswell")

app = new_app("Compare int8 as it is run with plain Q/DQ arithmetic.")


@app.command(cls=Command)
def kernels(
    bundle: BundleOption,
    root: Annotated[
        Path, typer.Option("--root", help="Data set whose test people are embedded, or its folder.")
    ],
    count: Annotated[
        int, typer.Option("--count", min=2, help="Pictures of different people, with a caption.")
    ] = 64,
    emulate: Annotated[
        bool, typer.Option("--emulate", help="ONNX Runtime under qemu-x86_64, too; minutes.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Embed in int8 by each library, with all its kernels and with fewer, and compare.

    ONNX Runtime always takes the best that a processor has: to see others it needs an emulator.

    Example: `python -m benchmarks.kernels -b demo/bundle --root demo/people`
    """
    print_result(measured(bundle, data_set(root), count, emulate), as_json, _show)


def measured(bundle: Path, root: Path, count: int, emulate: bool = False) -> dict[str, Any]:
    """Return, for each tower and way of running it, cosines to plain arithmetic."""
    if emulate and shutil.which(_EMULATOR[0]) is None:
        raise UsageError(f"there is no {_EMULATOR[0]}: apt install qemu-user")
    people = {record.pid: record for record in read_dataset("jsonl", root)["test"]}
    records = list(people.values())[:count]
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder, "asked.json")
        asked.write_text(
            json.dumps(
                {
                    "bundle": str(bundle),
                    "image": [str(record.image) for record in records],
                    "text": [record.captions[0] for record in records],
                }
            )
        )
        found = {"plain": _in_process("plain", asked)}
        found["plain, last bits changed"] = _in_process("last bits", asked)
        found["ONNX Runtime"] = _in_process("onnxruntime", asked)
        exact = _in_process("exact", asked)
        if emulate:
            found[_HASWELL] = _emulated("onnxruntime", asked)
        for name, bound in _BOUNDS.items():
            found[f"OpenVINO, {name}"] = _in_process("openvino", asked, ONEDNN_MAX_CPU_ISA=bound)
        found["OpenVINO"] = _in_process("openvino", asked)
    plain = found.pop("plain")
    result: dict[str, Any] = {"people": len(records)}
    for tower in TOWERS:
        result[tower] = {name: _agreement(one[tower], plain[tower]) for name, one in found.items()}
        first, *rest = (found[f"OpenVINO, {name}"][tower] for name in _BOUNDS)
        between = [_agreement(other, first) for other in rest]
        for name in ("ONNX Runtime", _HASWELL) if emulate else ("ONNX Runtime",):
            agreement = _agreement(found[name][tower], exact[tower])
            result[tower][f"{name}, to exact products"] = agreement
        result[tower]["OpenVINO, between these kernels"] = min(between, key=lambda one: one["min"])
    return result


def _in_process(runner: str, asked: Path, **environment: str) -> dict[str, NDArray[np.float32]]:
    output = asked.with_name(f"{runner}.npz")
    arguments = runner, str(asked), str(output)
    call_in_fresh_process(embed, *arguments, environment=environment)
    return dict(np.load(output))


def _emulated(runner: str, asked: Path) -> dict[str, NDArray[np.float32]]:
    output = asked.with_name("emulated.npz")
    code = "import sys; from benchmarks.kernel_runs import embed; embed(*sys.argv[1:])"
    interpreter = Path(sys.executable).resolve()  # The emulator starts no link.
    done = subprocess.run(
        [*_EMULATOR, interpreter, "-W", "ignore", "-c", code, runner, asked, output],
        env=child_environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise BackendError(f"under {' '.join(_EMULATOR)}: {said_last(done.stderr)}")
    return dict(np.load(output))


def _agreement(found_ND: NDArray[np.float32], plain_ND: NDArray[np.float32]) -> dict[str, float]:
    found = compare_embeds(plain_ND, found_ND)
    return {
        "min": found.min_cosine,
        "median": found.median_cosine,
        "below": int((found.cosine_N <= NEAR).sum()),
    }


def _show(result: dict[str, Any]) -> None:
    for tower in TOWERS:
        columns = ("lowest cosine", "median", f"of {result['people']} at most {NEAR}")
        table = new_table(f"{tower} tower to plain", *columns, right=columns)
        for name, one in result[tower].items():
            table.add_row(name, f"{one['min']:.6f}", f"{one['median']:.6f}", str(one["below"]))
        print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.kernels")
