"""DeepStream decodes, detects and tracks; a pad probe hands frames, boxes and tracks over.

Attach it behind the tracker, where frames are RGBA (nvvideoconvert, then a capsfilter with
video/x-raw(memory:NVMM),format=RGBA):

    pipeline = upperson_rt.Pipeline(encoder, gallery)
    pipeline.start()
    pipeline.add_camera("gate")
    pad.add_probe(Gst.PadProbeType.BUFFER, hand_over(pipeline, {0: "gate"}), 0)

Needs pyds and gi, which come with DeepStream. On a GPU card the streammux and converter must use
unified memory (``nvbuf-memory-type=3``); on a Jetson the default works.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyds
from gi.repository import Gst

import upperson_rt
from upperson_tensorrt.cuda import Cuda

PERSON = 0
"""Class of people in your detector."""
UNTRACKED = 0xFFFFFFFFFFFFFFFF


def each(entry: Any, kind: Any) -> Iterator[Any]:
    """Yield what a list of DeepStream holds."""
    while entry is not None:
        yield kind.cast(entry.data)
        try:
            entry = entry.next
        except StopIteration:
            return


def hand_over(pipeline: upperson_rt.Pipeline, cameras: Mapping[int, str]) -> Callable[..., Any]:
    """Return a probe; ``cameras`` names the sources of the streammux by their numbers."""
    integrated = Cuda().gpu.integrated  # Its frames are mapped, and have to be unmapped.

    def probe(pad: Any, info: Any, user_data: Any) -> Any:
        buffer = hash(info.get_buffer())
        batch = pyds.gst_buffer_get_nvds_batch_meta(buffer)
        for frame in each(batch.frame_meta_list, pyds.NvDsFrameMeta):
            people = [
                person
                for person in each(frame.obj_meta_list, pyds.NvDsObjectMeta)
                if person.class_id == PERSON and person.object_id != UNTRACKED
            ]
            boxes = [
                (box.left, box.top, box.left + box.width, box.top + box.height)
                for box in (person.rect_params for person in people)
            ]
            rgba = pyds.get_nvds_buf_surface(buffer, frame.batch_id)
            try:
                pipeline.submit(
                    cameras[frame.source_id],
                    rgba[:, :, :3],
                    boxes,
                    frame.ntp_timestamp / 1e9 or None,  # None is now.
                    tracks=[person.object_id for person in people],
                    rgb=True,
                )
            except upperson_rt.UppersonError as error:
                print(f"the gallery gets nothing more: {error}", file=sys.stderr)
                return Gst.PadProbeReturn.REMOVE  # The video goes on.
            finally:
                if integrated:
                    pyds.unmap_nvds_buf_surface(buffer, frame.batch_id)
        return Gst.PadProbeReturn.OK

    return probe
