"""One process of distributed toy runs, started by torchrun; writes the main process's losses.

python -m tests.helpers.train_process FOLDER... [--seeds FOLDER]

Each folder holds config.yaml and gets ``run`` and ``losses.json``; the one after --seeds gets two
runs, and the second process comes to it when the first has begun to write.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_camera import wait_for
from tests.helpers.invoke import run
from tests.helpers.toy_run import Recorder, know_toy
from upperson.config import read_config
from upperson.seeds import SEEDS_PLAN
from upperson.train import train


def main():
    """Train as one of several processes, one run after the other."""
    with pytest.MonkeyPatch.context() as patch:
        know_toy(patch)
        folders, _, with_seeds = " ".join(sys.argv[1:]).partition(" --seeds ")
        for folder in map(Path, folders.split()):
            recorder = Recorder()
            train(read_config(folder / "config.yaml"), folder / "run", recorder)
            if os.environ["RANK"] == "0":
                (folder / "losses.json").write_text(json.dumps(recorder.losses), "utf-8")
            else:
                assert recorder.losses == []
        if with_seeds:
            folder = Path(with_seeds)
            config = read_config(folder / "config.yaml")
            if os.environ["RANK"] != "0":
                wait_for((folder / "run" / SEEDS_PLAN).is_file)
            done = run(
                "train", "--root", config.root, "--recipe", folder / "config.yaml",
                "--output", folder / "run", "--device", "cpu", "--seeds", 2,
            )  # fmt: skip
            assert done.exit_code == 0, done.stderr


if __name__ == "__main__":
    main()
