"""The eager reference: any torch module with the network's signature, driven by the same loop. The only place that imports torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sr3rt.backends import Floats


class TorchNetwork:
    """A `Network` over `module(x, y, level) -> out`, in eval mode, on the CPU in float32."""

    backend, device, precision = "torch", "cpu", "fp32"

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module.eval()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`; the tensors share the arrays' memory."""
        inputs = [torch.from_numpy(array) for array in (x, y, level)]
        target = torch.from_numpy(out)

        def run() -> None:
            with torch.inference_mode():
                target.copy_(self._module(*inputs))

        return run
