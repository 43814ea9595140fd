"""How much a batcher takes on: requests and pixels that are not finished yet. Over the limit, the answer is no, at once."""

from __future__ import annotations

import threading

from sr3rt.errors import ImageTooLarge, Overloaded


class Admission:
    """Counts requests and the pixels of their results and previews. Thread-safe."""

    def __init__(self, *, requests: int, pixels: int) -> None:
        """The most of each at a time."""
        self.requests, self.pixels = requests, pixels
        self._lock = threading.Lock()
        self._places = self._taken = 0

    @property
    def unfinished(self) -> int:
        """Requests that hold a place."""
        return self._places

    def admit(self, pixels: int) -> Place:
        """A place for so many pixels. Raises Overloaded; ImageTooLarge where not even an idle server would take it."""
        if pixels > self.pixels:
            raise ImageTooLarge(f"the result would have {pixels} pixels; this server takes on at most {self.pixels} at a time")
        with self._lock:
            if self._places >= self.requests:
                raise Overloaded(f"{self._places} requests are unfinished, the limit is {self.requests}: try again later")
            if self._taken + pixels > self.pixels:
                raise Overloaded(
                    f"results and previews of {self._taken} pixels are unfinished and {pixels} more are asked for, the limit is "
                    f"{self.pixels}: try again later"
                )
            self._places += 1
            self._taken += pixels
        return Place(self, pixels)

    def _give_back(self, pixels: int) -> None:
        with self._lock:
            self._places -= 1
            self._taken -= pixels


class Place:
    """What `Admission.admit` gives; holds until `release`, which may be called again."""

    def __init__(self, admission: Admission, pixels: int) -> None:
        self._admission: Admission | None = admission
        self._pixels = pixels
        self._lock = threading.Lock()

    def release(self) -> None:
        """Let others have it."""
        with self._lock:
            admission, self._admission = self._admission, None
        if admission is not None:
            admission._give_back(self._pixels)
