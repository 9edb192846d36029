"""Run one benchmark, or all of them one after the other: ``python -m benchmarks [NAME [OPTIONS]]``.

Without options they run at the sizes that docs/dev/benchmarks.md shows.
"""

import os
import shlex
import signal
import subprocess
import sys

DOCUMENTED = (
    "towers --threads 1 --rounds 9",
    "people",
    "gallery --rows 100000 --threads 1",
    "gallery --rows 999000 --threads 1",
    "gallery --rows 1000000 --threads 1",
    "flash --rows 30000",
    "scores",
    "alerts --sentences 1000 --rows 20000",
    "recall",
    "promise",
)
"""Name and options of every run whose numbers are in docs/dev/benchmarks.md."""

BY_NAME = ("gpu", "month", "cost", "trials", "stores")
"""Run by name alone. Without an NVIDIA GPU the first ends at once, and its numbers go to pages of
their own, one a card. The third reads the numbers of the second. All but it and the first need the
demo, 20 GB and hours; the last also needs other libraries."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""numpy's threads have no option: they follow this variable, set before numpy is imported."""


def names() -> list[str]:
    """Return the names of all benchmarks."""
    return [*dict.fromkeys(line.split()[0] for line in DOCUMENTED), *BY_NAME]


def commands(arguments: list[str]) -> list[list[str]]:
    """Return the names and options to run for the arguments of the process.

    Raises:
        SystemExit: There is no such benchmark.
    """
    documented = [line.split() for line in DOCUMENTED]
    if not arguments:
        return documented
    name, *options = arguments
    if name not in names():
        sys.exit(f"error: no benchmark '{name}': expected one of {', '.join(names())}")
    if options or name in BY_NAME:
        return [arguments]
    return [line for line in documented if line[0] == name]


def main() -> None:
    """Run the benchmarks; the exit code is that of the first one that failed."""
    if sys.argv[1:] in (["--help"], ["-h"]):
        listed = f"Names: {', '.join(names())}. NAME --help lists the options of one."
        sys.stdout.write(f"{__doc__}\n{listed}\n")
        return
    wanted, failed = commands(sys.argv[1:]), 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # It then ends the benchmark as well.
    for name, *options in wanted:
        command = ["-m", f"benchmarks.{name}", *options]
        sys.stderr.write(f"python {shlex.join(command)}\n")
        done = subprocess.run([sys.executable, *command], env=_ONE_THREAD | os.environ)
        failed = failed or done.returncode
    sys.exit(failed)


if __name__ == "__main__":
    main()
