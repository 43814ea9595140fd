"""Upscales, telling each step; holds the weights and the batcher (sr3rt.serving.triton.Core)."""

from sr3rt.serving.triton import Core as TritonPythonModel  # noqa: F401
