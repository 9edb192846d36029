"""One process of distributed toy runs, started by torchrun; writes the main process's losses.

python -m tests.helpers.train_process FOLDER...

Each folder holds config.yaml and gets ``run`` and ``losses.json``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.helpers.toy_run import Recorder, know_toy
from upperson.config import read_config
from upperson.train import train


def main() -> None:
    """Train as one of several processes, one run after the other."""
    with pytest.MonkeyPatch.context() as patch:
        know_toy(patch)
        for folder in map(Path, sys.argv[1:]):
            recorder = Recorder()
            train(read_config(folder / "config.yaml"), folder / "run", recorder)
            if os.environ["RANK"] == "0":
                (folder / "losses.json").write_text(json.dumps(recorder.losses), "utf-8")
            else:
                assert recorder.losses == []


if __name__ == "__main__":
    main()
