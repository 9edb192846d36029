"""What threads have freed goes back to the system."""

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
from pathlib import Path
import numpy as np
from upperson_rt.machine import limit_heap

if sys.argv[1] == "little":
    limit_heap(32 << 20)
    limit_heap(1 << 20)
    limit_heap(16 << 20)  # Who asked for less is heard.

def held_mb():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) >> 10

kept, done, end = [], threading.Barrier(9), threading.Event()

def work():
    for _ in range(3):
        blocks = [np.ones(4 << 20, np.uint8) for _ in range(4)]
        kept.append([np.ones(1000, np.uint8) for _ in range(100)])  # Lies behind them.
        del blocks
    done.wait()
    end.wait()

before = held_mb()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
done.wait()
print(held_mb() - before)
end.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries do otherwise")
def test_large_blocks_of_threads_go_back():
    others = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")  # They may have said so already.
    environment = {name: os.environ[name] for name in os.environ if not name.startswith(others)}
    held_mb = {}
    for how in ("usual", "little"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=60, check=True
        )
        held_mb[how] = int(done.stdout)
    assert held_mb["little"] < 10
    assert held_mb["usual"] > 40  # The test shows something.
