"""Work with models of real size is done in a process of its own: its memory ends with it."""

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from tests.helpers.command_line import run_code


def alone(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a test that takes ``tmp_path`` in a process of its own; the tier's time limit holds."""
    code = f"import pathlib, sys\nfrom {test.__module__} import {test.__name__} as test\n"
    code += "test.__wrapped__(pathlib.Path(sys.argv[1]))"

    @functools.wraps(test)
    def run(tmp_path: Path) -> None:
        done = run_code(code, tmp_path, timeout_s=600)
        assert done.returncode == 0, done.stderr

    assert list(inspect.signature(test).parameters) == ["tmp_path"]
    return run


def found_alone(shared_folder: Path, work: Callable[..., Any], *paths: Path) -> Any:
    """Return what a module's function finds in a process of its own, once a session, as JSON."""
    name = f"{work.__module__}.{work.__name__}"
    folder = shared_folder / name
    with FileLock(f"{folder}.lock"):
        found = folder / "found.json"
        if not found.exists():
            (folder / "work").mkdir(parents=True, exist_ok=True)
            code = (
                "import gc, json, pathlib, sys\ngc.set_threshold(10_000, 10, 1_000_000)\n"
                f"from {work.__module__} import {work.__name__} as work\n"
                "folder, *paths = map(pathlib.Path, sys.argv[1:])\n"
                "found = json.dumps(work(folder / 'work', *paths))\n"
                "(folder / 'found.json').write_text(found)"
            )
            done = run_code(code, folder, *paths, timeout_s=1800)
            assert done.returncode == 0, done.stderr
        return json.loads(found.read_text())
