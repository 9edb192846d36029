import subprocess
import sys

import pytest

import upperson_rt
from upperson_rt.errors import BackendError, missing_extra


def test_import_is_light():
    code = (
        "import sys, upperson_rt; "
        "heavy = {'numpy', 'PIL', 'onnxruntime', 'openvino', 'tokenizers', 'typer', 'torch'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    path = upperson_rt.__path__[0].rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_command_line_starts_without_the_heavy_parts():
    code = (
        "import sys, upperson_rt.cli; "
        "heavy = {'numpy', 'PIL', 'onnxruntime', 'openvino', 'tokenizers', 'sqlite3', 'torch'}; "
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    path = upperson_rt.__path__[0].rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_listed():
    for name in upperson_rt.__all__:
        assert getattr(upperson_rt, name) is not None
        assert name in dir(upperson_rt)
    assert set(upperson_rt._OWNERS) == set(upperson_rt.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Bundel'"):
        upperson_rt.Bundel  # noqa: B018


def test_missing_extra_names_the_command():
    error = missing_extra("openvino", "cpu", "the backend 'openvino'")
    assert isinstance(error, BackendError)
    assert "pip install 'upperson[cpu]'" in str(error)
