"""Every exception that sr3rt raises on purpose, on one page.

Each message says what was found, what was expected and what to do. `except sr3rt.SR3Error` catches all of them.

    SR3Error
    ├── OptionError (ValueError)        an argument that cannot be used: steps, sampler, seed, schedule, backend name
    ├── ImageError (ValueError)         a picture that cannot be read, or is of a kind that is refused
    │   └── ImageTooLarge               over the byte, pixel or memory limit; names the limit
    ├── BundleError                     a bundle that cannot be used
    │   ├── BundleNotFound              nothing there
    │   ├── BundleCorrupt               a hash, a name or the manifest is not what it should be
    │   ├── BundleIncompatible          written by a newer format
    │   └── EngineRefused               a TensorRT engine of another network, TensorRT or GPU
    ├── BackendError                    a backend, precision or device that cannot be had
    │   └── MissingExtra (ImportError)  a Python package is missing; the message is the pip command
    ├── CheckpointError                 a checkpoint that cannot be exported (export only)
    ├── ParityError                     the exported network does not reproduce the checkpoint (export only)
    ├── NonFiniteError                  a step produced NaN or infinity; names the step
    ├── Cancelled                       `on_step` returned False, or a request was cancelled
    └── ServingError                    a request that a server did not take, or did not finish
        ├── Overloaded                  over the limit of requests or pixels; nothing was begun: try again later
        ├── DeadlineExceeded            its time ran out, while it waited or ran
        └── Stopped                     the server is shutting down, or failed for good
"""

from __future__ import annotations


class SR3Error(Exception):
    """Base of every error that sr3rt raises on purpose."""


class OptionError(SR3Error, ValueError):
    """An option has a value that cannot be used."""


class ImageError(SR3Error, ValueError):
    """A picture cannot be read, or is of a kind that is refused."""


class ImageTooLarge(ImageError):
    """A picture is over the byte, pixel or memory limit."""


class BundleError(SR3Error):
    """A bundle cannot be used."""


class BundleNotFound(BundleError):
    """There is no bundle at the path."""


class BundleCorrupt(BundleError):
    """A bundle's hash, file names or manifest are not what they should be."""


class BundleIncompatible(BundleError):
    """A bundle's format is newer than this program."""


class EngineRefused(BundleError):
    """A TensorRT engine was built for another network, shape, TensorRT, GPU or driver than the one at hand."""


class BackendError(SR3Error):
    """A backend, precision or device was asked for and cannot be had."""


class MissingExtra(BackendError, ImportError):
    """A Python package that an optional feature needs is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(f'{feature} needs the package {package!r}, which is not installed: run  pip install "sr3rt[{extra}]"')
        self._told = feature, package, extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str, str, str]]:
        return type(self), self._told  # to be made again in another process


class CheckpointError(SR3Error):
    """A checkpoint cannot be exported."""


class ParityError(SR3Error):
    """The exported network does not reproduce the checkpoint."""


class NonFiniteError(SR3Error):
    """A refinement step produced NaN or infinity."""


class Cancelled(SR3Error):
    """The run was cancelled, by its `on_step` or from outside."""


class ServingError(SR3Error):
    """A server did not take a request, or did not finish it."""


class Overloaded(ServingError):
    """A request is over the server's limit of requests or pixels; nothing was begun."""


class DeadlineExceeded(ServingError):
    """A request's time ran out."""


class Stopped(ServingError):
    """The server is shutting down, or failed for good."""
