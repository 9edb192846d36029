"""Bundles with right hashes that no export writes, and a trial of each under limits.

    python -m tests.helpers.hostile_bundles

Each is opened with each of `BACKENDS`, in a process of its own that has `MEMORY_BYTES`,
`PROCESSOR_S` and `WALL_S`; a table shows how each ended. Anything but a refusal with exit code 5
or 6 counts against us.
"""

import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.helpers.hostile_canaries import CANARIES
from tests.helpers.hostile_changes import Change, changed_json, changed_text
from tests.helpers.hostile_graphs import GRAPHS
from tests.helpers.hostile_tokenizers import TOKENIZERS
from tests.helpers.toy_bundle import CONTEXT_LENGTH, EMBED_DIM, make_toy_bundle
from upperson_rt.bundle import Bundle
from upperson_rt.errors import UppersonError

MEMORY_BYTES = 3 << 30
PROCESSOR_S = 20
WALL_S = 300.0
"""Who waits for something takes no processor's time; but other work may leave almost none."""
BACKENDS = ("onnxruntime", "openvino")
FORK = multiprocessing.get_context("fork")


_manifest = partial(changed_json, "bundle.json")
_json = partial(changed_text, "bundle.json")


def _of_variant(**fields: Any) -> Change:
    return _manifest(lambda content: content["variants"]["int8"].update(fields))


def _named(path: str) -> Change:
    """Call the tokenizer's file something else."""
    return _manifest(lambda content: content["text"]["tokenizer"].update(file=path))


def _replaced(old: str, new: str) -> Change:
    return _json(lambda text: text.replace(old, new, 1))


def _section(name: str, **fields: Any) -> Change:
    return _manifest(lambda content: content[name].update(fields))


def _linked(folder: Path) -> None:
    outside = folder.parent / "outside"
    outside.write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(outside)


def _piped(folder: Path) -> None:
    (folder / "canaries.npz").unlink()
    os.mkfifo(folder / "canaries.npz")


MANIFESTS: dict[str, Change] = {
    "manifest: a tokenizer that is the manifest": _named("bundle.json"),
    "manifest: a tokenizer that is the canaries": _named("canaries.npz"),
    "manifest: a file of this system": _named("/etc/hostname"),
    "manifest: a file of another system": _named("C:tokenizer.json"),
    "manifest: a file on another machine": _named("\\\\server\\tokenizer.json"),
    "manifest: a file that is the folder": _named("."),
    "manifest: a file with a null": _named("tokenizer.json\0.png"),
    "manifest: a file name of 500,000 letters": _named("a" * 500_000),
    "manifest: a file 200,000 folders down": _named("a/" * 200_000 + "a"),
    "manifest: a file name that clears the screen": _named("\x1b[2J\x1b]0;x\7"),
    "manifest: a file name of half a character": _replaced("tokenizer.json", "\\ud800"),
    "manifest: a link out of the folder": _linked,
    "manifest: a pipe in place of a file": _piped,
    "manifest: one graph for both towers": _manifest(
        lambda c: c["variants"]["int8"].update(text=c["variants"]["int8"]["image"])
    ),
    "manifest: sizes of 10**4000": _replaced('"size_bytes": ', f'"size_bytes": {"9" * 4000}'),
    "manifest: a size that is a fraction": _replaced('"size_bytes": ', '"size_bytes": 1.'),
    "manifest: a version that is true": _manifest(lambda c: c.update(schema_version=True)),
    "manifest: a version below zero": _manifest(lambda c: c.update(schema_version=-1)),
    "manifest: a cosine of 0.5": _of_variant(canary_min_cosine=0.5),
    "manifest: a cosine above one": _of_variant(canary_min_cosine=1.0000001),
    "manifest: a cosine that is true": _of_variant(canary_min_cosine=True),
    "manifest: a cosine below zero": _of_variant(canary_min_cosine=-1),
    "manifest: accuracies below zero": _of_variant(metrics={"R@1": -0.5}),
    "manifest: accuracies that are lists": _of_variant(metrics={"R@1": [73]}),
    "manifest: accuracies that are infinite": _replaced("73.5", "1e999"),
    "manifest: accuracies that are no numbers": _replaced("73.5", "NaN"),
    "manifest: a calibration 90,000 deep": _replaced(
        '"calibration": null', '"calibration": ' + '{"a":' * 90_000
    ),
    "manifest: a variant of another's precision": _of_variant(precision="fp32"),
    "manifest: another number of dimensions": _section("model", embed_dim=EMBED_DIM + 1),
    "manifest: longer sentences": _section("text", context_length=CONTEXT_LENGTH + 1),
    "manifest: larger pictures": _section("image", height_px=4096),
    "manifest: a key beside the others": _manifest(lambda c: c.update(run="rm -rf /")),
    "manifest: a million zeros": _json(lambda text: text + "\0" * 1_000_000),
    "manifest: a million blanks more": _json(lambda text: text + " " * (1 << 20)),
    "manifest: nothing but blanks": _json(lambda _: " " * 1000),
    "manifest: a mark of byte order": _json(lambda text: "\ufeff" + text),
    "manifest: latin letters": _json(
        lambda text: text.replace("toy", "t\u00f6y").encode("latin-1")
    ),
}  # fmt: skip

HOSTILE = CANARIES | TOKENIZERS | MANIFESTS | GRAPHS
"""By what is wrong: what makes a sound bundle such a one."""


def try_bundle(folder: Path, backend: str) -> tuple[str, object]:
    """Open a bundle and use it; return how it ended, and the error's reason."""
    try:
        bundle = Bundle.open(folder, backend=backend, threads=1)
        bundle.check_golden_samples()
        bundle.encoder().encode_texts(["a man in red"])
    except UppersonError as error:
        return f"{error.exit_code} {error}", error.fields.get("reason")
    except BaseException as error:
        return f"raw error: {error!r}", None
    return "taken", None


def _be_a_trial(folder: Path, backend: str, answer: Connection) -> None:
    """Try a bundle in a forked process with limits; send how it ended and its largest memory."""
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CPU, PROCESSOR_S),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    outcome = try_bundle(folder, backend)[0][:4000]
    answer.send((outcome, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10))
    os._exit(0)  # Nothing may lead back to what only the first process does.


def in_process(folder: Path, backend: str) -> tuple[str, float, int]:
    """Return how it ended, seconds, and the most bytes that the process had."""
    began = time.monotonic()
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_be_a_trial, args=(folder, backend, sender))
    child.start()
    sender.close()
    outcome, size_bytes = f"hung for {WALL_S:g} s", 0
    try:
        if receiver.poll(WALL_S):
            outcome, size_bytes = receiver.recv()
    except EOFError:
        child.join()
        outcome = f"ended with exit code {child.exitcode}"
    seconds = time.monotonic() - began
    child.kill()
    child.join()
    return outcome, seconds, size_bytes


def _try_all(sound: Path, backend: str) -> int:
    counts: Counter[str] = Counter()
    longest, largest = 0.0, 0
    said, seconds, usual = in_process(sound, backend)
    assert said == "taken", said
    print(f"{backend}, sound: {seconds:.1f} s, {usual >> 20} MiB")
    for what, change in HOSTILE.items():
        copy = shutil.copytree(sound, sound.parent / "copy")
        change(copy)
        said, seconds, size = in_process(copy, backend)
        shutil.rmtree(copy)
        outcome = f"refused, exit code {said[0]}" if said.startswith(("5 ", "6 ")) else "BAD"
        counts[outcome] += 1
        longest, largest = max(longest, seconds), max(largest, size - usual)
        shown = said if outcome == "BAD" else said[:200]
        print(f"{what:60} {seconds:5.1f} s {(size - usual) >> 20:5d} MiB  {shown!r}", flush=True)
    print(backend, dict(counts), f"{longest:.1f} s and {largest >> 20} MiB more than sound at most")
    return counts["BAD"]


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        sound = make_toy_bundle(Path(name, "sound"))
        return int(sum([_try_all(sound, backend) for backend in BACKENDS]) > 0)


if __name__ == "__main__":
    sys.exit(main())
