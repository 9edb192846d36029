"""People from a loop of your own: you read, detect and draw, the pipeline does the rest.

python docs/examples/opencv_loop.py bundle gallery street.avi "woman in red coat"
"""

import sys
import time

import cv2

import upperson_rt
from upperson_camera import HogDetector


def watch(pipeline: upperson_rt.Pipeline, source: str) -> None:
    """Read a video or camera to its end."""
    detector = HogDetector()  # Or anything else that returns rows of x0, y0, x1, y1[, score].
    capture = cv2.VideoCapture(source)
    pipeline.add_camera("gate", drop="block")  # A film waits: no frame is dropped.
    began = time.time()
    while True:
        there_is_one, frame = capture.read()
        if not there_is_one:
            break
        boxes = detector(frame)
        taken = began + capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        pipeline.submit("gate", frame, boxes, taken)  # Copies the frame.
        for x0, y0, x1, y1 in boxes[:, :4].astype(int):
            cv2.rectangle(frame, (x0, y0), (x1, y1), (0, 200, 0), 2)
        # Show `frame`, record it, or do whatever your program is for.
    capture.release()


def main(bundle: str, place: str, source: str, sentence: str) -> None:
    """Fill a gallery, then search it."""
    encoder = upperson_rt.open(bundle)
    with upperson_rt.Gallery.open(
        place, encoder.fingerprint, encoder.embed_dim, create=True
    ) as gallery:
        with upperson_rt.Pipeline(encoder, gallery) as pipeline:
            watch(pipeline, source)
        # Here the pipeline has ended, and all that it accepted is in the gallery.
        camera = pipeline.stats().cameras["gate"]
        print(f"{camera.tracks} tracks, {camera.committed} pictures added")
        print(f"frames dropped {dict(camera.frames_dropped)}, people {dict(camera.crops_dropped)}")
        for hit in upperson_rt.Retriever(encoder, gallery).query(sentence, k=3, by_track=True):
            print(f"{hit.score:.3f}", hit.item.track, hit.item.crop)


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit("usage: opencv_loop.py BUNDLE GALLERY VIDEO SENTENCE")
    main(*sys.argv[1:])
