"""Both wheels, built once for all workers."""

from pathlib import Path

import pytest
from filelock import FileLock

from tests.helpers.command_line import ROOT
from tests.packaging.test_packaging import build


@pytest.fixture(scope="session")
def wheels(shared_folder: Path) -> list[Path]:
    """The wheels of ``upperson`` and ``upperson-rt``."""
    folder = shared_folder / "wheels"
    with FileLock(f"{folder}.lock"):
        for project in () if folder.exists() else (ROOT, ROOT / "runtime"):
            build(project, "wheel", folder / project.name)
    return [next(folder.glob(name)) for name in ("*/upperson-*.whl", "*/upperson_rt-*.whl")]
