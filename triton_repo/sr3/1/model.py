"""Upscales, one answer to a request; sr3_stream does the work (sr3rt.serving.triton.Front)."""

from sr3rt.serving.triton import Front as TritonPythonModel  # noqa: F401
