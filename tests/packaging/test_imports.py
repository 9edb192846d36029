import pytest

from tests.helpers.command_line import ROOT, run_code, run_program
from tests.helpers.frozen_options import iter_commands

RUNTIME = ROOT / "runtime"
NOT_ON_THE_EDGE = [
    "onnx", "onnxscript", "open_clip", "safetensors", "torch", "torchvision", "transformers",
    "upperson", "upperson_calibration", "upperson_export",
]  # fmt: skip
BACKENDS = ["onnxruntime", "openvino", "tensorrt"]
HEAVY = [
    *NOT_ON_THE_EDGE[:7],
    *BACKENDS,
    "PIL",
    "matplotlib",
    "numpy",
    "sqlite3",
    "tokenizers",
    "yaml",
]


def modules_of(folder):
    """Every module below a package's folder by its dotted name."""
    return sorted(
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    )


OPTIONAL = [path.name for path in RUNTIME.glob("upperson_*") if path.name != "upperson_rt"]


def loaded_by(code, candidates, without=()):
    """Run code in a fresh interpreter and return which of the modules it has loaded."""
    report = f"; import sys; print(*(n for n in {candidates!r} if sys.modules.get(n)))"
    done = run_code(code + report, without=without)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_all_of_the_runtime_imports_on_the_edge():
    """In any order, since no modules of it import one another in a circle (`lint-imports`)."""
    code = "import " + ", ".join(modules_of(RUNTIME / "upperson_rt"))
    done = run_code(code, without=[*NOT_ON_THE_EDGE, *BACKENDS, *OPTIONAL])
    # Commands of packages that are not there are left out, with a warning.
    others = [one for one in done.stderr.splitlines() if "of upperson.commands" not in one]
    assert (done.returncode, others) == (0, [])


def test_the_runtime_loads_no_backend_by_itself():
    code = "import " + ", ".join(modules_of(RUNTIME / "upperson_rt"))
    assert loaded_by(code, [*NOT_ON_THE_EDGE, *BACKENDS]) == []


@pytest.mark.parametrize(
    "module", ["upperson", "upperson_calibration", "upperson_export", "upperson_rt"]
)
def test_importing_a_package_costs_nothing(module):
    assert loaded_by(f"import {module}", [*HEAVY, "typer", "rich"]) == []


@pytest.mark.parametrize("module", ["upperson.cli", "upperson_rt.cli"])
def test_command_lines_start_without_the_heavy_parts(module):
    assert loaded_by(f"import {module}", HEAVY) == []


def test_help_works_without_torch():
    for program in ("upperson", "upperson-rt"):
        done = run_program(program, "--help", without=HEAVY[:10])
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout


def test_help_of_every_upperson_command_works_without_torch():
    code = (
        "from typer.testing import CliRunner; import upperson.cli; "
        "print([CliRunner().invoke(upperson.cli.app, [*n.split()[1:], '--help']).exit_code "
        f"for n in {[n for n, _ in iter_commands() if n.startswith('upperson ')]!r}])"
    )
    done = run_code(code, without=HEAVY[:10])
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.strip("[]\n").split(", ")) == {"0"}
