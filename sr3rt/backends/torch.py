"""A program (docs/program.md) carried out in PyTorch, at any precision and on any device, and as a network of the loops.

Written from the specification, not from the networks that programs are made of: it is also what other implementations are compared with.
The only file of the package proper that imports torch; the backend that others see is pytorch.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sr3rt.backends import Floats, Request, cuda
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import Enqueue
from sr3rt.backends.on_device import AnySize, Shapes, gpu_index
from sr3rt.bundle import Bundle
from sr3rt.errors import BackendError
from sr3rt.program import GAIN, LIFT, Program, Register, Tensors, check, last_used, opened, parts, registers

_FLAGS = threading.Lock()  # PyTorch's flags are the process's

Module = Callable[..., Tensor]
"""`module(x, y, level)` is the prediction, float32 all: a `TorchProgram`, a network of export/nets, or either compiled. It may take more,
which is computed of x alone.
"""

Registers = dict[str, Tensor]
Operation = Callable[[Registers, "_Level"], Tensor]
Step = tuple[str, Operation, set[str]]
"""The register that is written, how, and those that are not needed after it."""


class TorchProgram:
    """`program(x, y, level)` is the prediction. Immutable, and safe to use from several threads.

    So is `program(x, y, level, *program.once(x))`, with less to compute at every step. given: registers that `once` gives, and their types.
    dtype: of convolutions and of what they give; of everything else too if that is float64, float32 otherwise: the level, norms, softmax
    and the wavelet's arithmetic, which float16 cannot hold.
    """

    def __init__(self, program: Program, tensors: Tensors, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        """Raises KeyError, TypeError or ValueError for what is not a program."""
        check(program)
        self.dtype, self.wide, self.device = dtype, torch.float64 if dtype == torch.float64 else torch.float32, device
        self._tensors = tensors
        self._wavelet = _Wavelet(self._channels(program["operations"]), self.wide, device)
        self._level = self._embedding(**program["level"], told=[one["level"] for one in program["operations"] if one.get("level")])
        self._made = {one["to"]: self._operation(**one) for one in program["operations"]}
        apart = parts(program["operations"])
        self.given = {name: self._kind(name, program["operations"]) for name in (apart.given if apart else ())}
        self._all = self._steps(program["operations"], {"out"})
        self._step = self._steps(apart.step, {"out"}) if apart else self._all
        self._once = self._steps(apart.once, {*self.given}) if apart else []
        del self._tensors, self._made

    def __call__(self, x: Tensor, y: Tensor, level: Tensor, *given: Tensor) -> Tensor:
        """x, y: (N, C, H, W); level: (N, 1); the result, too, is of the wide type."""
        registers = {"x": x, "y": y} | {name: value.to(kind) for (name, kind), value in zip(self.given.items(), given, strict=False)}
        return _carried_out(self._step if given else self._all, registers, self._level(level))["out"].to(self.wide)

    def once(self, x: Tensor) -> list[Tensor]:
        """What `given` names, of the wide type; x: (N, C, H, W)."""
        registers = _carried_out(self._once, {"x": x}, None)
        return [registers[name].to(self.wide) for name in self.given]

    def _steps(self, operations: Sequence[Program], kept: set[str]) -> list[Step]:
        done = last_used(operations, kept)
        return [(one["to"], self._made[one["to"]], unused) for one, unused in zip(operations, done, strict=True)]

    def _channels(self, operations: Sequence[Program]) -> int:
        """Of the picture, as far as the wavelet needs them: a third of what its details are drawn with. 0 without one."""
        made = {one["to"]: one for one in operations}
        name = next((one["from"][-1] for one in operations if one["do"] == "from_bands"), None)
        while name and made[name]["do"] != "convolution":
            name = made[name]["from"][0]
        return len(self._tensors[made[name]["weight"]]) // 3 if name else 0

    def _kind(self, name: str, operations: Sequence[Program]) -> torch.dtype:
        """Of a register that is made of x alone: other operations than convolutions keep what they find."""
        (made,) = (one for one in operations if one["to"] == name)
        if made["do"] == "convolution":
            return self.dtype
        return self.wide if made["from"][0] == "x" else self._kind(made["from"][0], operations)

    def _weight(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.array(self._tensors[name])).to(self.device, dtype)

    def _linear(self, *, weight: str, bias: str) -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=self._weight(weight, self.wide), bias=self._weight(bias, self.wide))

    def _embedding(
        self, *, input: str, scale: float, frequencies: str, layers: list[dict[str, str]], silu: bool, told: list[Mapping[str, str]]
    ) -> Callable[[Tensor], _Level]:
        """told: what convolutions make of the embedding, all of it in one product: each by itself is hardly more than a kernel's start."""
        multiples, linear = scale * self._weight(frequencies, self.wide), [self._linear(**layer) for layer in layers]
        weights, biases = ([self._weight(one[key], self.wide) for one in told] for key in ("weight", "bias"))
        names, sizes = [one["weight"] for one in told], [len(bias) for bias in biases]
        project = partial(F.linear, weight=torch.cat(weights), bias=torch.cat(biases)) if told else None

        def embed(level: Tensor) -> _Level:
            made = _Level(level)
            phase = (made.value if input == "level" else (made.noise / made.gamma).log() / 2) * multiples
            e = torch.cat([phase.sin(), phase.cos()], dim=1)
            for i, layer in enumerate(linear):
                e = layer(F.silu(e) if i else e)
            if project:
                projected = project(F.silu(e) if silu else e).to(self.dtype)
                made.told = dict(zip(names, torch.split(projected, sizes, dim=1), strict=True))
            return made

        return embed

    def _operation(self, *, do: str, to: str, **rest: Any) -> Operation:
        return {  # type: ignore[no-any-return, operator]
            "convolution": self._convolution,
            "resample": self._resample,
            "attention": self._attention,
            "unshuffle": self._unshuffle,
            "to_bands": self._to_bands,
            "from_bands": self._from_bands,
        }[do](rest.pop("from"), **rest)

    def _convolution(
        self,
        sources: list[str],
        *,
        norm: Mapping[str, Any] | None,
        silu: bool,
        resample: str | None,
        weight: str,
        bias: str | None,
        stride: int,
        level: Mapping[str, str] | None,
        after: str | None,
        add: str | None,
        gain: float,
    ) -> Operation:
        kernel = self._weight(weight, self.dtype)
        if self.dtype in (torch.float16, torch.bfloat16):  # in the order of a GPU's units for these, which others are put into each time
            kernel = kernel.contiguous(memory_format=torch.channels_last)
        height, width = kernel.shape[2:]
        padding = {(1, 1): 0, (3, 3): 1}[height, width]
        convolve = partial(
            F.conv2d, weight=kernel, bias=None if bias is None else self._weight(bias, self.dtype), stride=stride, padding=padding
        )
        normalise, conditioned = norm and self._norm(**norm), level and self._conditioned(**level)
        resized, activated = {None: None, "up": _up, "down": _down}[resample], {None: False, "silu": True}[after]

        def run(registers: Registers, known: _Level) -> Tensor:
            h = _joined(registers, sources)
            if normalise:
                h = normalise(h)
            if silu:
                h = F.silu(h)
            if resized:
                h = resized(h)
            h = convolve(h.to(self.dtype))
            if conditioned:
                h = conditioned(h, known)
            if activated:
                h = F.silu(h)
            if add is not None:
                h = h + registers[add].to(self.dtype)
            return h if gain == 1 else h * gain

        return run

    def _norm(self, *, groups: int, eps: float, weight: str, bias: str) -> Callable[[Tensor], Tensor]:
        scale, shift = self._weight(weight, self.wide), self._weight(bias, self.wide)
        return lambda h: F.group_norm(h.to(self.wide), groups, scale, shift, eps).to(h.dtype)

    def _conditioned(self, *, weight: str, bias: str, kind: str) -> Callable[[Tensor, _Level], Tensor]:
        parts = {"shift": 1, "scale_shift": 2}[kind]

        def run(h: Tensor, known: _Level) -> Tensor:
            *scale, shift = _wide(known.told[weight]).chunk(parts, dim=1)
            return (h * (1 + scale[0]) if scale else h) + shift

        return run

    def _resample(self, sources: list[str], *, by: str) -> Operation:
        resized = {"up": _up, "down": _down}[by]
        return lambda registers, known: resized(_one(registers, sources))

    def _attention(self, sources: list[str]) -> Operation:
        def run(registers: Registers, known: _Level) -> Tensor:
            qkv = _one(registers, sources)
            q, k, v = qkv.flatten(2).transpose(1, 2).chunk(3, dim=2)  # (N, H·W, C)
            weights = torch.softmax((q * q.shape[2] ** -0.5 @ k.transpose(1, 2)).to(self.wide), dim=2).to(v.dtype)
            return (weights @ v).transpose(1, 2).reshape(q.shape[0], q.shape[2], *qkv.shape[2:])

        return run

    def _unshuffle(self, sources: list[str], *, by: int) -> Operation:
        return lambda registers, known: F.pixel_unshuffle(_one(registers, sources), by)

    def _to_bands(self, sources: list[str], *, detail: float) -> Operation:
        def run(registers: Registers, known: _Level) -> Tensor:
            mean, details = self._bands(registers, sources, known)
            return torch.cat([F.pixel_unshuffle(mean, 2), details * known.spread(detail).rsqrt()], dim=1)

        return run

    def _from_bands(self, sources: list[str], *, detail: float) -> Operation:
        *bands, fine = sources

        def run(registers: Registers, known: _Level) -> Tensor:
            (mean, details), spread = self._bands(registers, bands, known), known.spread(detail)
            drawn = registers[fine].to(self.wide) * (_wide(known.noise).sqrt() * detail * spread.rsqrt())
            return mean + self._wavelet.picture(details * (_wide(known.value) * detail**2 / spread) + drawn)

        return run

    def _bands(self, registers: Registers, sources: list[str], known: _Level) -> tuple[Tensor, Tensor]:
        """The mean, and the details of y, made once."""
        key = tuple(sources)
        if key not in known.bands:
            x, y, places = (registers[name].to(self.wide) for name in sources)
            mean = _mean(x, places)
            known.bands[key] = mean, self._wavelet.details(mean, y, known)
        return known.bands[key]


class _Level:
    """What is known in a call of the pictures' levels, each (N, 1): the value, γ, 1 - γ; and what was made of them.

    told: to convolutions, by the weight's name. bands: mean and details, by the registers that they are of.
    """

    def __init__(self, value: Tensor) -> None:
        self.value, self.gamma = value, value * value
        self.noise = (1 - self.gamma).clamp(min=1e-7)
        self.told: dict[str, Tensor] = {}
        self.bands: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def spread(self, detail: float) -> Tensor:
        """(N, 1, 1, 1)."""
        return _wide(self.gamma * detail**2 + self.noise)


def _carried_out(steps: Iterable[Step], registers: Registers, known: _Level | None) -> Registers:
    """The registers that are left."""
    for to, operation, done in steps:
        registers[to] = operation(registers, known)  # type: ignore[arg-type]
        for name in done:
            del registers[name]
    return registers


def _wide(value: Tensor) -> Tensor:
    return value[:, :, None, None]


def _joined(registers: Registers, sources: list[str]) -> Tensor:
    return registers[sources[0]] if len(sources) == 1 else torch.cat([registers[name] for name in sources], dim=1)


def _one(registers: Registers, sources: list[str]) -> Tensor:
    (source,) = sources
    return registers[source]


def _up(h: Tensor) -> Tensor:
    return F.interpolate(h, scale_factor=2, mode="nearest")


def _down(h: Tensor) -> Tensor:
    return F.avg_pool2d(h, 2)


def _mean(x: Tensor, places: Tensor) -> Tensor:
    """x and what `places`, of S² times its channels, holds for each S×S."""
    return x + F.pixel_shuffle(places, x.shape[2] // places.shape[2])


class _Wavelet:
    """The program's wavelet on pictures of so many channels, each by itself. Along height (dim 2) and width (3)."""

    def __init__(self, channels: int, dtype: torch.dtype, device: str) -> None:
        kernels = [torch.tensor([*taps[::-1], *taps], dtype=dtype, device=device).repeat(2 * channels, 1, 1, 1) for taps in LIFT]
        self._kernels = {2: [kernel.transpose(2, 3).contiguous() for kernel in kernels], 3: kernels}

    def details(self, mean: Tensor, y: Tensor, known: _Level) -> Tensor:
        """The three detail bands of y - √γ mean."""
        rows = torch.cat(self._split(y - _wide(known.value) * mean, 2), dim=1)
        low, high = self._split(rows, 3)  # of low rows, then of high ones
        first, third = high.chunk(2, dim=1)
        return torch.cat([first, low[:, y.shape[1] :], third], dim=1)

    def picture(self, details: Tensor) -> Tensor:
        """Whose coarse band is zero."""
        first, second, third = details.chunk(3, dim=1)
        rows = self._merge(torch.cat([torch.zeros_like(first), second], dim=1), torch.cat([first, third], dim=1), 3)
        low, high = rows.chunk(2, dim=1)
        return self._merge(low, high, 2)

    def _split(self, h: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        """One level along `dim`: low and high band."""
        even, odd = h.reshape(*h.shape[:dim], -1, 2, *h.shape[dim + 1 :]).unbind(dim + 1)
        odd = self._lifted(odd, even, 0, dim, 1)
        even = self._lifted(even, odd, 1, dim, 1)
        odd = self._lifted(odd, even, 2, dim, 1)
        return even * GAIN, odd / GAIN

    def _merge(self, low: Tensor, high: Tensor, dim: int) -> Tensor:
        """The inverse of `_split`."""
        even, odd = low / GAIN, high * GAIN
        odd = self._lifted(odd, even, 2, dim, -1)
        even = self._lifted(even, odd, 1, dim, -1)
        odd = self._lifted(odd, even, 0, dim, -1)
        return torch.stack([even, odd], dim + 1).flatten(dim, dim + 1)

    def _lifted(self, line: Tensor, other: Tensor, step: int, dim: int, sign: int) -> Tensor:
        """One step on `line`, odd places where `step` is even, reading `other`: as a convolution, which is one kernel."""
        channels, reach, odd = line.shape[1], len(LIFT[step]), step % 2 == 0
        before, after = reach - odd, reach - 1 + odd
        ends = (other.narrow(dim, place, 1) for place in (0, other.shape[dim] - 1))
        first, last = (end.expand(*(count if i == dim else -1 for i in range(4))) for end, count in zip(ends, (before, after), strict=True))
        wide = torch.cat([first, other, last], dim)  # torch.compile fails (2.13) where F.pad comes after a pixel_shuffle
        return torch.add(line, F.conv2d(wide, self._kernels[dim][step][:channels], groups=channels), alpha=sign)


def on_gpu(bundle: Bundle, request: Request) -> TorchOnGpu:
    """The bundle's program on the GPU asked for. Raises BackendError (a PyTorch without CUDA, too little memory) or BundleCorrupt."""
    if not torch.cuda.is_available():
        raise BackendError(
            f"PyTorch {torch.__version__} does not find the GPU that CUDA finds: install one that was built for CUDA "
            f"{cuda.runtime_version()}, see https://pytorch.org/get-started"
        )
    gpu = Gpu(gpu_index(request.device))
    precision = "fp32" if request.precision == "auto" else request.precision
    kind = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    with opened(bundle) as (program, tensors):
        try:
            module = TorchProgram(program, tensors, dtype=kind, device=f"cuda:{gpu.index}")
            found = registers(program["operations"], tensors, bundle.manifest.channels)
            torch.cuda.current_stream(gpu.index).synchronize()  # by which the weights went, and for which the loop's does not wait
        except torch.OutOfMemoryError as error:
            raise BackendError(f"the weights of {bundle.path} do not fit {gpu.name}: {error}") from error
    given = {name: found[name] for name in module.given}
    return TorchOnGpu(module, gpu, channels=bundle.manifest.channels, precision=precision, once=module.once, given=given)


class TorchOnGpu(AnySize):
    """A `Network` over a module on a GPU. Safe to use from several threads. precision: what is reported as the module's.

    once: of x alone, what the module takes after x, y and level; given: what that is, in this order.
    """

    backend = "torch"

    def __init__(
        self,
        module: Module,
        gpu: Gpu,
        *,
        channels: int,
        precision: str = "fp32",
        once: Callable[[Tensor], Sequence[Tensor]] = lambda x: (),
        given: Mapping[str, Register] | None = None,
    ) -> None:
        super().__init__(gpu, channels=channels, given=given or {})
        self._module, self.precision, self._once = module, precision, once

    def compiled(self) -> TorchOnGpu:
        """The same by `torch.compile`, whose first call of every batch and size takes a minute. Its kernels are captured like others."""
        module = torch.compile(self._module, mode="max-autotune-no-cudagraphs", dynamic=False)
        return TorchOnGpu(module, self.gpu, channels=self._channels, precision=self.precision, once=self._once, given=self._given)

    def _enqueuer(self, part: str, inputs: Shapes, outputs: Shapes, batch: int, stream: Stream) -> Enqueue:
        """As `AnySize`'s. What a call needs besides comes from a pool of its own, which a captured graph goes on using."""
        run, tensors, shapes = _enqueuer(self.gpu, stream), dict[int, Tensor](), {**inputs, **outputs}

        def enqueue(addresses: Mapping[str, int]) -> None:
            for name, shape in shapes.items():
                if addresses[name] not in tensors:
                    tensors[addresses[name]] = _tensor(addresses[name], (batch, *shape), self.gpu)

            def calls() -> None:
                values = [tensors[addresses[name]] for name in inputs]
                made = self._once(*values) if part == "once" else [self._module(*values)]
                for name, value in zip(outputs, made, strict=True):
                    tensors[addresses[name]].copy_(value)

            try:
                run(calls)
            except torch.OutOfMemoryError as error:
                size = "×".join(map(str, (batch, *inputs["x"])))
                raise BackendError(f"the torch backend has not the memory for {size}: {error}") from error

        return enqueue


class TorchNetwork:
    """A `Network` over a module on the CPU in float32: the eager reference."""

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


def _enqueuer(gpu: Gpu, stream: Stream) -> Callable[[Callable[[], Any]], None]:
    """A function that makes PyTorch's calls in another go to that stream, with memory from one pool."""
    with torch.cuda.device(gpu.index):
        pool = torch.cuda.MemPool()
    external = torch.cuda.ExternalStream(stream.handle, device=gpu.index)  # type: ignore[no-untyped-call]

    @contextmanager
    def there() -> Iterator[None]:
        with torch.inference_mode(), torch.cuda.device(gpu.index), torch.cuda.stream(external), torch.cuda.use_mem_pool(pool):
            yield

    def run(calls: Callable[[], Any]) -> None:
        with there(), _FLAGS, torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # which is on by default, and is not float32
            calls()

    return run


def _tensor(address: int, shape: tuple[int, ...], gpu: Gpu) -> torch.Tensor:
    """Float32 memory on the GPU as a tensor, which does not own it."""
    interface = {"data": (address, False), "shape": shape, "typestr": "<f4", "version": 3}
    return torch.as_tensor(type("Memory", (), {"__cuda_array_interface__": interface})(), device=f"cuda:{gpu.index}")
