"""The line that says what an export is doing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str], None]


@contextmanager
def progress_line() -> Iterator[Progress]:
    """A line that says what is going on; on a terminal it moves."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("starting") as status:

        def progress(text: str) -> None:
            status.update(text)
            if not console.is_terminal:
                console.print(text)

        yield progress
