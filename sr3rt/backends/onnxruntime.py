"""onnxruntime. On the CPU inputs and output are bound to the loop's own arrays, so that a step copies nothing; on a GPU its calls go to the
stream of the loop of backends/device.py, and are captured with the step. That one needs onnxruntime-gpu in place of onnxruntime.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from sr3rt.backends import Floats, Request, cuda
from sr3rt.backends.cuda import Gpu, Stream
from sr3rt.backends.device import Enqueue
from sr3rt.backends.on_device import AnySize, Shapes, gpu_index
from sr3rt.bundle import NETWORK, ONCE, STEP, WEIGHTS, WEIGHTS_BEFORE, Bundle
from sr3rt.errors import BackendError, MissingExtra
from sr3rt.program import Register, given_registers

if TYPE_CHECKING:
    import onnxruntime

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CAPTURABLE = (1, 31, 1)
"""The first version whose calls may be captured: https://github.com/microsoft/onnxruntime/pull/32121."""


def why_not() -> str | None:
    """Why this backend cannot run here, or None when it can."""
    return None if find_spec("onnxruntime") else str(MissingExtra("the onnxruntime backend", "onnxruntime", "cpu"))


def refusal(bundle: Bundle, request: Request) -> str | None:
    """Why this backend cannot do what is asked with that bundle, or None when it can."""
    if request.precision not in ("auto", "fp32", "fp16"):
        return f"the onnxruntime backend has fp32 and fp16, precision {request.precision!r} was asked for: use auto or fp32"
    if not bundle.manifest.graphs(_precision(request)):
        return f"{bundle.path} has no network in {_precision(request)}: make it with  python -m sr3rt.export.to_trt {bundle.path}"
    return None if request.device in ("auto", "cpu") else why_not_on_gpu()


def why_not_on_gpu() -> str | None:
    """Why onnxruntime, which is installed, cannot run on a GPU here, or None when it can."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} here was built for the CPU alone: to run it on a GPU,  pip uninstall onnxruntime  "
            "and then  pip install onnxruntime-gpu  (the two overwrite each other)"
        )
    if tuple(map(int, re.findall(r"\d+", onnxruntime.__version__)[:3])) < CAPTURABLE:
        needed = ".".join(map(str, CAPTURABLE))
        return (
            f"onnxruntime-gpu {onnxruntime.__version__} ends the process when its calls are captured into a graph: "
            f'pip install --upgrade "onnxruntime-gpu>={needed}"'
        )
    return cuda.why_not()


def _precision(request: Request) -> str:
    """What is asked for."""
    return "fp16" if request.precision == "fp16" else "fp32"


def load(bundle: Bundle, request: Request, *, hoisted: bool = True) -> OrtNetwork | OrtOnGpu:
    """hoisted: whether what depends on x alone is computed once for each x, where the bundle has it apart.

    Raises MissingExtra, BackendError (precision or device that it does not have) or BundleCorrupt.
    """
    if not find_spec("onnxruntime"):
        raise MissingExtra("the onnxruntime backend", "onnxruntime", "cpu")
    if reason := refusal(bundle, request):
        raise BackendError(reason)
    precision, channels = _precision(request), bundle.manifest.channels
    graphs = bundle.manifest.graphs(precision, hoisted=hoisted)
    if not graphs:
        raise BackendError(f"{bundle.path} has its network in {precision} in two parts only, and was asked for the whole")
    if request.device in ("auto", "cpu"):
        return OrtNetwork(lambda: [_session(bundle, graph, [CPU], threads=request.thread_count) for graph in graphs], precision=precision)
    gpu = Gpu(gpu_index(request.device))

    def on(stream: Stream) -> list[onnxruntime.InferenceSession]:
        return [_session(bundle, graph, [_on_stream(gpu, stream), CPU], threads=1) for graph in graphs]

    return OrtOnGpu(on, gpu, channels=channels, given=given_registers(bundle) if len(graphs) > 1 else {}, precision=precision)


def _on_stream(gpu: Gpu, stream: Stream) -> tuple[str, dict[str, str]]:
    """The provider whose calls go to that stream, in float32 proper."""
    return CUDA, {"device_id": str(gpu.index), "user_compute_stream": str(stream.handle), "use_tf32": "0"}


def _session(bundle: Bundle, name: str, providers: list[Any], *, threads: int) -> onnxruntime.InferenceSession:
    """The bundle's graph `name`. Raises BackendError, BundleCorrupt."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.enable_mem_pattern = False  # for which the second call takes as much memory again as the first
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between calls its threads would take the loop's processors
    beside = {WEIGHTS, WEIGHTS_BEFORE}.intersection(bundle.manifest.files if name in (NETWORK, ONCE, STEP) else ())
    weights = {file: bundle.read(file) for file in beside}
    options.add_external_initializers_from_files_in_memory([*weights], [*weights.values()], [*map(len, weights.values())])
    model = bundle.read(name)
    on_gpu = any(provider[0] == CUDA for provider in providers)
    try:
        if on_gpu:
            with redirect_stdout(sys.stderr):  # where it tells of what it does not find
                onnxruntime.preload_dlls(msvc=False)  # CUDA's libraries as pip installs them, where no loader looks
        session = onnxruntime.InferenceSession(model, options, providers=providers, enable_fallback=0)
    except Exception as error:  # onnxruntime's own exceptions have no common base
        raise BackendError(f"onnxruntime {onnxruntime.__version__} cannot load {bundle.path / name}: {error}") from error
    if on_gpu and CUDA not in session.get_providers():  # it takes the CPU, and says nothing
        raise BackendError(
            f"onnxruntime {onnxruntime.__version__} does not find the libraries of CUDA and cuDNN that it was built for: "
            'pip install "onnxruntime-gpu[cuda,cudnn]"'
        )
    _MADE.add(session)
    return session


_MADE = WeakSet[Any]()  # sessions and bindings
_FOR_EVER: list[Any] = []


def _forked() -> None:
    """In a new process. Its parent's sessions wait there for threads that do not exist, be it only to be let go of."""
    _FOR_EVER.extend(_MADE)
    _MADE.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


class OrtNetwork:
    """A `Network` over one session, or over two: the second then computes of x what the first takes besides x, y and level.

    make: makes them; called again in a forked process, the first time that it runs the network there.
    Sessions are thread-safe; each binding is its own. fp16 is what a GPU computes, slowly: few CPUs have its arithmetic, and onnxruntime
    widens what they lack.
    """

    backend, device = "onnxruntime", "cpu"

    def __init__(self, make: Callable[[], Sequence[onnxruntime.InferenceSession]], *, precision: str = "fp32") -> None:
        self._make, self.precision = make, precision
        self._sessions, self._process = make(), os.getpid()

    def bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """As `Network.bind`. The arrays' memory is bound, not copied. A call raises BackendError, above all when memory runs out."""
        step, process = self._bind(x, y, level, out), os.getpid()

        def run() -> None:
            nonlocal step, process
            if process != os.getpid():
                step, process = self._bind(x, y, level, out), os.getpid()
            try:
                step()
            except Exception as error:  # onnxruntime's own exceptions have no common base
                raise BackendError(
                    f"onnxruntime failed on {'×'.join(map(str, x.shape))} (batch, channels, height, width): {error}"
                ) from error

        return run

    def _bind(self, x: Floats, y: Floats, level: Floats, out: Floats) -> Callable[[], None]:
        """A call of this process's sessions. The caller holds the arrays: bindings have only their addresses."""
        if self._process != os.getpid():
            self._sessions, self._process = self._make(), os.getpid()
        session, *others = self._sessions
        binding = _bound(session, x=x, y=y, level=level)
        binding.bind_output("out", "cpu", 0, np.float32, out.shape, out.ctypes.data)
        before = [_given(once, x, binding) for once in others]

        def step() -> None:
            for give in before:
                give()
            session.run_with_iobinding(binding)

        return step


def _given(once: onnxruntime.InferenceSession, x: Floats, binding: onnxruntime.IOBinding) -> Callable[[], None]:
    """A call that gives `binding` what `once` computes of x, anew where x is not what it was."""
    names = [output.name for output in once.get_outputs()]
    first = _bound(once, x=x)
    for name in names:
        first.bind_output(name, "cpu")
    seen: Floats | None = None

    def give() -> None:
        nonlocal seen
        if seen is not None and np.array_equal(seen.view(np.uint32), x.view(np.uint32)):
            return
        seen = None  # until it has been computed
        once.run_with_iobinding(first)
        for name, value in zip(names, first.get_outputs(), strict=True):
            binding.bind_ortvalue_input(name, value)
        seen = x.copy()

    return give


def _bound(session: onnxruntime.InferenceSession, **inputs: Floats) -> onnxruntime.IOBinding:
    """A binding of the arrays' memory on the host."""
    binding = session.io_binding()
    _MADE.add(binding)
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
    return binding


class OrtOnGpu(AnySize):
    """A `Network` over sessions on a GPU, some for each stream, as a session has its own. Safe to use from several threads.

    on: makes them, with calls that go to that stream: one, or two as of `OrtNetwork`. given: what the second computes of x.
    """

    backend = "onnxruntime"

    def __init__(
        self,
        on: Callable[[Stream], Sequence[onnxruntime.InferenceSession]],
        gpu: Gpu,
        *,
        channels: int,
        given: Mapping[str, Register],
        precision: str = "fp32",
    ) -> None:
        super().__init__(gpu, channels=channels, given=given)
        self._on, self.precision = on, precision
        self._sessions = WeakKeyDictionary[Stream, "Sequence[onnxruntime.InferenceSession]"]()

    def _on_stream(self, stream: Stream) -> Sequence[onnxruntime.InferenceSession]:
        if stream not in self._sessions:
            self._sessions[stream] = self._on(stream)
        return self._sessions[stream]

    def _enqueuer(self, part: str, inputs: Shapes, outputs: Shapes, batch: int, stream: Stream) -> Enqueue:
        """As `AnySize`'s. A session's first call chooses algorithms and takes its memory; none later takes more."""
        session = self._on_stream(stream)[part == "once"]
        run, bindings, names = _enqueuer(session, stream), dict[tuple[int, ...], Any](), (*inputs, *outputs)

        def enqueue(addresses: Mapping[str, int]) -> None:
            places = tuple(addresses[name] for name in names)
            try:
                if places not in bindings:
                    binding = session.io_binding()
                    for name, shape in inputs.items():
                        binding.bind_input(name, *self._place(), np.float32, (batch, *shape), addresses[name])
                    for name, shape in outputs.items():
                        binding.bind_output(name, *self._place(), np.float32, (batch, *shape), addresses[name])
                    bindings[places] = binding
                run(bindings[places])
            except Exception as error:  # onnxruntime's own exceptions have no common base
                size = "×".join(map(str, (batch, *inputs["x"])))
                raise BackendError(f"onnxruntime failed on {size} on {self.gpu.name}: {error}") from error

        return enqueue

    def _place(self) -> tuple[str, int]:
        return "cuda", self.gpu.index


def _enqueuer(session: onnxruntime.InferenceSession, stream: Stream) -> Callable[[Any], None]:
    """A function that puts the call of a binding on the session's stream, which is this one, and does not wait for it."""
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(binding: Any, _held: Stream = stream) -> None:  # of which the session has only the handle
        session.run_with_iobinding(binding, options)

    return run
