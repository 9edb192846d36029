"""Files for inference servers, made from a finished bundle; constants come from its manifest."""

from upperson_export.serving.deepstream import write_deepstream
from upperson_export.serving.folder import ServingFolder, require_serving_place
from upperson_export.serving.triton import write_triton

__all__ = ["ServingFolder", "require_serving_place", "write_deepstream", "write_triton"]
