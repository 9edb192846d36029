"""An RTSP camera decoded by a Jetson's hardware, as a GStreamer pipeline that OpenCV opens.

python docs/examples/gstreamer_source.py bundle gallery rtsp://10.0.0.5/stream yolox_nano.onnx

Needs an OpenCV with GStreamer: that of JetPack or of the distribution. Wheels from PyPI have none.
"""

import signal
import sys

import upperson_rt
from upperson_camera import open_detector

JETSON = (
    "rtspsrc location={address} latency=200 protocols=tcp ! rtph264depay ! h264parse ! "
    "nvv4l2decoder ! nvvidconv ! video/x-raw,format=BGRx ! videoconvert ! "
    "video/x-raw,format=BGR ! appsink drop=true max-buffers=1 sync=false"
)
"""``drop=true max-buffers=1`` keeps the newest picture only, so nothing old piles up before us."""

PROCESSOR = (
    "rtspsrc location={address} latency=200 protocols=tcp ! rtph264depay ! h264parse ! "
    "avdec_h264 ! videoconvert ! video/x-raw,format=BGR ! "
    "appsink drop=true max-buffers=1 sync=false"
)
"""The same without decoding hardware."""


def main(bundle: str, place: str, address: str, detector: str, elements: str = JETSON) -> None:
    """Watch one camera until SIGTERM or Ctrl-C; what was accepted is committed first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    encoder = upperson_rt.open(bundle)
    with upperson_rt.Gallery.open(
        place, encoder.fingerprint, encoder.embed_dim, create=True
    ) as gallery:
        pipeline = upperson_rt.Pipeline(encoder, gallery, every_s=5.0, save_crops=False)
        pipeline.add_camera("gate", elements.format(address=address), open_detector(detector))
        try:
            with pipeline:
                pipeline.wait()  # A live source never ends: it is opened again.
        except KeyboardInterrupt:
            pass
        print(f"{pipeline.stats().total('committed')} people added, {gallery.count()} in all")


if __name__ == "__main__":
    if len(sys.argv) not in (5, 6):
        sys.exit("usage: gstreamer_source.py BUNDLE GALLERY ADDRESS DETECTOR [PIPELINE]")
    main(*sys.argv[1:])
