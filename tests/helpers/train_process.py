"""One process of a distributed toy run, started by torchrun; writes the main process's losses.

python -m tests.helpers.train_process CONFIG RUN LOSSES
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
    """Train as one of several processes."""
    config, run, losses = map(Path, sys.argv[1:])
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        know_toy(patch)
        train(read_config(config), run, recorder)
    if os.environ["RANK"] == "0":
        losses.write_text(json.dumps(recorder.losses), "utf-8")
    else:
        assert recorder.losses == []


if __name__ == "__main__":
    main()
