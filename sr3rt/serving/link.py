"""From `sr3`'s process to `sr3_stream`'s: requests and answers over a Unix socket that only this user can open.

Not by Triton's own call from model to model: it never returns when the other model dies, and forgets the codes of errors; and under load
Triton's Python stub died while such calls were in hand ("free(): invalid pointer", 2.51), which it has not done since.

A message is a JSON object, then bytes; a connection carries one request at a time. The listener's first message says that the connection
is taken: a connection that is not, as when too many files are open, is nothing to wait at for long. Of a peer that dies, the other end is
told at once, by the socket.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import secrets
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from sr3rt.errors import Stopped
from sr3rt.serving.scratch import MEETING
from sr3rt.serving.service import Handle

Message = tuple[dict[str, Any], bytes]
Send = Callable[[dict[str, Any], bytes], None]

TAKEN = 10.0  # seconds for a connection to be taken
PAUSE = 0.2  # seconds between attempts to take one, when that fails
KEPT = 16  # idle connections
LATER = "try again later; restart the server if it stays so"

log = logging.getLogger(__name__)


def folder_of(server_pid: int) -> Path:
    """Where the models of a server meet, which is running and was not told where.

    A process id is not enough: in every container Triton has the same, and a temporary folder outlives it or is shared.
    """
    after_name = Path(f"/proc/{server_pid}/stat").read_text().rpartition(")")[2].split()
    started = int(after_name[19])  # proc(5): field 22, in ticks since the machine's start
    namespace = Path("/proc/self/ns/pid").stat().st_ino
    name = hashlib.sha256(f"{server_pid} {started} {namespace}".encode()).hexdigest()[:12]  # a socket's path has 107 bytes at most
    return Path(tempfile.gettempdir()) / f"sr3rt-{os.getuid()}-{name}"


def address(model: str) -> str:
    """Where the model listens: known to all models of one server, whose parent process is the same. Raises Stopped."""
    given = os.environ.get(MEETING)
    folder = Path(given) if given else folder_of(os.getppid())
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise Stopped(f"{folder} is not this user's alone: remove it, and restart the server")
    return str(folder / model)


class _Line:
    """A connection that several threads may send on."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: dict[str, Any], data: bytes) -> None:
        with self._sending:
            self._connection.send_bytes(json.dumps(message).encode())
            self._connection.send_bytes(data)

    def receive(self, *, within: float | None = None) -> Message:
        """The next message. Raises TimeoutError where none comes `within` seconds."""
        if within is not None and not self._connection.poll(within):
            raise TimeoutError
        return json.loads(self._connection.recv_bytes()), self._connection.recv_bytes()

    def close(self) -> None:
        with self._sending:
            self._connection.close()


class Responder:
    """Listens. For each request calls `begin(message, data, send)`, which answers by `send`, once, and may return what to cancel."""

    def __init__(self, where: str, begin: Callable[[dict[str, Any], bytes, Send], Handle | None]) -> None:
        self._begin = begin
        own = f"{where}-{secrets.token_hex(4)}"  # one that is reloaded listens beside the one that drains, or was killed
        self._closed = threading.Event()
        self._listener = Listener(own, "AF_UNIX", backlog=4096)
        threading.Thread(target=self._accept, name="sr3rt-link", daemon=True).start()
        Path(f"{own}.new").symlink_to(own)
        Path(f"{own}.new").replace(where)

    def close(self) -> None:
        """Listen no more; connections stay until their peer closes them."""
        self._closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                line = _Line(self._listener.accept())
                threading.Thread(target=self._serve, args=(line,), daemon=True).start()
            except (OSError, RuntimeError) as error:  # too many files are open, or threads; or it was closed
                if not self._closed.is_set():
                    log.warning("a request could not be taken, and waits: %s", error)
                    self._closed.wait(PAUSE)

    def _serve(self, line: _Line) -> None:
        handle: Handle | None = None
        number = None

        def send(answer: dict[str, Any], data: bytes) -> None:
            with contextlib.suppress(OSError):  # nobody waits any more
                line.send(answer, data)

        try:
            line.send({}, b"")  # it is taken
            while True:
                message, data = line.receive()
                if "cancel" not in message:
                    number = message["number"]
                    handle = self._begin(message, data, send)
                elif handle is not None and message["cancel"] == number:
                    handle.cancel()
        except (EOFError, OSError):
            if handle is not None:
                handle.cancel()
        finally:
            line.close()


class Peer:
    """Asks a `Responder`. Thread-safe: connections are kept, one for each request at a time."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._idle: list[_Line] = []
        self._numbers = itertools.count(1)

    def ask(self, message: dict[str, Any], data: bytes, *, begun: Callable[[Callable[[], None]], None]) -> Message:
        """Send and wait. `begun` is told what cancels the request. Raises Stopped where nobody listens or the answer does not come."""
        for line, kept in self._lines():
            number = next(self._numbers)
            try:
                line.send({**message, "number": number}, data)
                begun(_Cancel(line, number))
                answer = line.receive()
            except (EOFError, OSError) as error:
                line.close()
                if kept:  # it may have been closed long ago
                    continue
                raise Stopped(f"the model that holds the weights is gone ({type(error).__name__}): {LATER}") from None
            if len(self._idle) < KEPT:
                self._idle.append(line)
            else:
                line.close()
            return answer
        raise AssertionError

    def close(self) -> None:
        """Close what is kept."""
        while self._idle:
            self._idle.pop().close()

    def _lines(self) -> Iterator[tuple[_Line, bool]]:
        """Those that are kept, then a new one. Raises Stopped."""
        while self._idle:
            try:
                yield self._idle.pop(), True
            except IndexError:  # another thread took it
                break
        try:
            new = _Line(Client(self._where, "AF_UNIX"))
            try:
                new.receive(within=TAKEN)
            except BaseException:
                new.close()
                raise
        except TimeoutError:
            raise Stopped(f"the model that holds the weights did not take the request within {TAKEN:g} s: {LATER}") from None
        except (EOFError, OSError) as error:
            why = getattr(error, "strerror", None) or type(error).__name__
            raise Stopped(f"the model that holds the weights cannot be reached ({why}): {LATER}") from None
        yield new, False


class _Cancel:
    """Asks for a request to be cancelled; too late, it does nothing."""

    def __init__(self, line: _Line, number: int) -> None:
        self._line, self._number = line, number

    def __call__(self) -> None:
        with contextlib.suppress(OSError):
            self._line.send({"cancel": self._number}, b"")
