"""What the networks of the backends on a GPU have in common: their place, their loop, and calls from the host."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import numpy as np

from sr3rt.backends import Floats
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import DeviceEngine, DeviceNetwork, Enqueue, Stage
from sr3rt.program import Register

BATCHES = (1, 2, 4, 8, 16)  # of a network that can take any number: few, as each has graphs of its own


class OnDevice:
    """What every `DeviceNetwork` of ours has: its place and its loop."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.device = gpu, f"cuda:{gpu.index}"

    def bind(self: DeviceNetwork, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`."""
        return bind(self, x, y, level, out)

    def engine(self: DeviceNetwork, *, capacity: int, channels: int, height: int, width: int) -> DeviceEngine:
        """As `sr3rt.engine.engine_of`."""
        return DeviceEngine(self, capacity=capacity, channels=channels, height=height, width=width)

    def memory(self: DeviceNetwork, count: int, height: int, width: int) -> int:
        """As `Planned.memory`: none of the host's; what the GPU lacks is told when it is taken. Raises as `batches`."""
        self.batches(height, width)
        return 0

    def given(self, height: int, width: int) -> Mapping[str, tuple[int, int, int]]:
        """As `DeviceNetwork.given`."""
        return {}

    def once(self, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.once`."""
        raise AssertionError("nothing is given")


Shapes = Mapping[str, tuple[int, ...]]
"""Of one picture's values, by name: (C, H, W), and (1,) of the level."""


class AnySize(OnDevice, ABC):
    """One that takes any batch and size.

    channels: of a picture. given: what it computes of x alone, for each picture once.
    """

    def __init__(self, gpu: Gpu, *, channels: int, given: Mapping[str, Register]) -> None:
        super().__init__(gpu)
        self._channels, self._given = channels, given

    @abstractmethod
    def _enqueuer(self, part: str, inputs: Shapes, outputs: Shapes, batch: int, stream: Stream) -> Enqueue:
        """Calls of the network's part, "once" or "step", for so many pictures."""

    def batches(self, height: int, width: int) -> tuple[int, ...]:
        """As `DeviceNetwork.batches`."""
        return BATCHES

    def given(self, height: int, width: int) -> Mapping[str, tuple[int, int, int]]:
        """As `DeviceNetwork.given`."""
        return {name: register.shape(height, width) for name, register in self._given.items()}

    def once(self, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.once`."""
        return self._enqueuer("once", {"x": (self._channels, height, width)}, self.given(height, width), 1, stream)

    def enqueuer(self, batch: int, height: int, width: int, stream: Stream) -> Enqueue:
        """As `DeviceNetwork.enqueuer`."""
        picture = self._channels, height, width
        inputs = {"x": picture, "y": picture, "level": (1,), **self.given(height, width)}
        return self._enqueuer("step", inputs, {"out": picture}, batch, stream)


def no_gpu(backend: str, device: str) -> str | None:
    """Why the device that was asked for is none of that backend's, or None."""
    if re.fullmatch(r"auto|cuda(:\d+)?", device):
        return None
    return f"the {backend} backend runs on a GPU, device {device!r} was asked for: use auto, cuda, or cuda:1 for the second one"


def gpu_index(device: str) -> int:
    """Of the GPU that was asked for."""
    return int(device.partition(":")[2] or 0)


def bind(network: DeviceNetwork, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
    """`Network.bind` for a network on a GPU: y and the levels are copied there in each call, x where it changed, and out back."""
    stage = Stage(network, capacity=len(x), channels=x.shape[1], height=x.shape[2], width=x.shape[3])
    calls, stream = stage.cover(len(x)), stage.stream
    seen: Floats | None = None

    def run() -> None:
        nonlocal seen
        stage.gpu.use()
        if seen is None or not np.array_equal(seen.view(np.uint32), x.view(np.uint32)):
            seen = None  # until it has been computed
            stream.to_device(stage.x, x)
            for slot in range(len(x)) if stage.once else ():
                stage.know(slot)
            seen = x.copy()
        stream.to_device(stage.y, y)
        for first, batch in calls:
            stream.to_device(stage.level(first), level[first : first + batch])
        stage.predict(calls)
        stream.to_host(out, stage.net)
        stream.wait("in the network")

    return run
