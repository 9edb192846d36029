"""Files for inference servers, made from a finished bundle; constants come from its manifest."""

from upperson_export.serving.deepstream import write_deepstream
from upperson_export.serving.folder import ServingFolder
from upperson_export.serving.triton import write_triton

__all__ = ["ServingFolder", "write_deepstream", "write_triton"]
