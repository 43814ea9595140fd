"""Serving: a batcher over the slots engine, a service of pictures over the batcher, and Triton's models over the service.

    triton.py  ─▶  service.py  ─▶  batcher.py  ─▶  sr3rt.engine
    tensors, codes     pictures, options   jobs, order, limits     steps

Each knows only what is to its right. `server.py` writes a model repository and starts Triton Inference Server on it, `guard.py` stands
before Triton's HTTP, and `run.py` keeps both up: `sr3rt serve`.
"""
