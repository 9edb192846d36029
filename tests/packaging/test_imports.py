"""What the packages import, and what they do without, in fresh interpreters."""

import pytest

from tests.helpers.command_line import ROOT, run_code
from tests.helpers.frozen_options import iter_commands

NOT_ON_THE_EDGE = [
    "onnx", "onnxscript", "open_clip", "safetensors", "torch", "torchvision", "transformers",
    "upperson", "upperson_calibration", "upperson_export",
]  # fmt: skip
BACKENDS = ["onnxruntime", "openvino", "tensorrt"]
HEAVY = [
    *NOT_ON_THE_EDGE[:7], *BACKENDS, "PIL", "matplotlib", "numpy", "sqlite3", "tokenizers", "yaml",
]  # fmt: skip
CORE = ["upperson_rt", "upperson_phrases"]
OPTIONAL = [one.name for one in (ROOT / "runtime").glob("upperson_*") if one.name not in CORE]


def modules_of(folder):
    """Every module below a package's folder by its dotted name."""
    return sorted(
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    )


def loaded_by(code, candidates, without=()):
    """Run code in a fresh interpreter; return which of the modules it has loaded, and warnings."""
    report = f"; import sys; print(*(n for n in {candidates!r} if sys.modules.get(n)))"
    done = run_code(code + report, without=without)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), done.stderr.splitlines()


def test_all_of_the_runtime_imports_on_the_edge_and_loads_no_backend():
    """In any order, since no modules of it import one another in a circle (`lint-imports`)."""
    modules = [name for package in CORE for name in modules_of(ROOT / "runtime" / package)]
    code = "import " + ", ".join(modules)
    assert loaded_by(code, [*NOT_ON_THE_EDGE, *BACKENDS]) == ([], [])
    _, warnings = loaded_by(code, [], [*NOT_ON_THE_EDGE, *BACKENDS, *OPTIONAL])
    # Commands of packages that are not there are left out, with a warning.
    assert [one for one in warnings if "of upperson.commands" not in one] == []


def test_a_gallery_needs_no_other_package_but_the_log_of_deletions(tmp_path):
    others = [one for one in OPTIONAL if one != "upperson_log"]
    code = (
        "import numpy as np; from upperson_rt.gallery import Gallery, Item; from pathlib import "
        f"Path; g = Gallery.open({str(tmp_path)!r}, 'sha256:0', 4, create=True); "
        "g.add([Item(key='a'), Item(key='b')], np.eye(2, 4, dtype=np.float32)); "
        "assert g.search(np.eye(1, 4, dtype=np.float32), 1)[0][0].item.key == 'a'; "
        "assert g.delete(['a']) == 1; assert (g.count(), g.verify()) == (1, [])"
    )
    assert loaded_by(code, OPTIONAL, others) == (["upperson_log"], [])


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("upperson, upperson_calibration, upperson_export, upperson_rt", [*HEAVY, "typer", "rich"]),
        ("upperson.cli, upperson_rt.cli", HEAVY),
    ],
)
def test_imports_load_nothing_heavy(modules, heavy):
    assert loaded_by(f"import {modules}", heavy)[0] == []


def test_help_of_every_command_works_without_torch():
    code = (
        "from typer.testing import CliRunner; import upperson.cli, upperson_rt.cli; "
        "apps = {'upperson': upperson.cli.app, 'upperson-rt': upperson_rt.cli.app}; "
        "print({CliRunner().invoke(apps[p], [*w, '--help']).exit_code "
        f"for p, *w in {[name.split() for name, _ in iter_commands()]!r}}})"
    )
    done = run_code(code, without=HEAVY[:10])
    assert (done.returncode, done.stdout) == (0, "{0}\n"), done.stderr
