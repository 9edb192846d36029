"""Kills a Milvus server while a camera is watched, and counts what of the accepted crops is lost.

    python -m tests.helpers.outage_figures 40

The argument is how many seconds the server is away, besides what it takes to start.
"""

import argparse
import tempfile
import threading
import time
from pathlib import Path

import upperson_rt
from tests.helpers.fake_camera import BOX, START, person_frame
from tests.helpers.milvus_server import MilvusServer
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_camera import Pipeline
from upperson_machine.description import resident_bytes
from upperson_rt.gallery import Gallery

_INTERVAL_S = 0.1
_AROUND_S = 8.0
"""Seconds of watching before and after the outage."""


def _submit(pipeline: Pipeline, ended: threading.Event) -> None:
    number = 0
    while not ended.wait(_INTERVAL_S):
        pipeline.submit("gate", person_frame(), [BOX], START + number, tracks=[number])
        number += 1


def try_outage(folder: Path, outage_s: float) -> dict[str, float | None]:
    """Return what was accepted, what is in the gallery, and memory, once all has been sent."""
    encoder = upperson_rt.open(make_toy_bundle(folder / "bundle"), "fp32", "onnxruntime")
    server = MilvusServer(folder / "milvus", folder / "binaries")
    server.start()
    location = f"milvus://127.0.0.1:{server.port}/people"
    ended = threading.Event()
    options = {"every_s": 0.0, "min_views": 1, "save_crops": False, "buffer": folder / "buffer"}
    try:
        with Gallery.open(location, encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
            with Pipeline(encoder, gallery, **options) as pipeline:  # type: ignore[arg-type]
                pipeline.add_camera("gate")
                submitting = threading.Thread(target=_submit, args=(pipeline, ended))
                submitting.start()
                time.sleep(_AROUND_S)
                before = resident_bytes("VmRSS")
                server.kill()
                killed = time.monotonic()
                time.sleep(outage_s)
                waiting, during = pipeline.stats().buffered, resident_bytes("VmRSS")
                server.start()
                away_s = time.monotonic() - killed
                time.sleep(_AROUND_S)
                ended.set()
                submitting.join()
            accepted, rows = pipeline.stats().total("accepted"), gallery.count()
    finally:
        ended.set()
        server.close()
    return {
        "away_s": away_s, "accepted": accepted, "waiting": waiting, "rows": rows,
        "lost": accepted - rows, "rss_before": before, "rss_during": during,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", type=float)
    with tempfile.TemporaryDirectory() as folder:
        figures = try_outage(Path(folder), parser.parse_args().seconds)
    for name, value in figures.items():
        print(f"{name:12} {value}")
    return int(figures["lost"] != 0)


if __name__ == "__main__":
    raise SystemExit(main())
