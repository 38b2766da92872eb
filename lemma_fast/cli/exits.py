"""What a command says when it ends: one sentence, and an exit code.

0 all is well, 1 some inputs failed, 2 bad usage, 130 Ctrl-C, 143 a plain kill.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer


def printable(text: str, encoding: str) -> str:
    """Escape what a file's name may hold, but a terminal cannot show or would obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


def say(text: str, err: bool = False) -> None:
    """Print one line, on standard output or standard error; nothing where that is closed."""
    stream = sys.stderr if err else sys.stdout
    typer.echo(printable(text, getattr(stream, "encoding", None) or "utf-8"), err=err)


def misused(message: object) -> NoReturn:
    """Say what is wrong with the command line, as typer says it, and end with exit code 2."""
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    raise typer.BadParameter(printable(str(message), encoding))


def fail(message: str) -> NoReturn:
    """Say why a command cannot do what it was asked for, and end with exit code 2."""
    say(f"error: {message}", err=True)
    raise typer.Exit(2)


@contextmanager
def interruptible(
    said: str, tell: Callable[[str], object] = lambda text: say(text, err=True)
) -> Iterator[Callable[[], None]]:
    """Let Ctrl-C and a plain kill end the block so that it can clean up; `tell` `said` then.

    The exit codes are 130 and 143. Yields a function that ends a block which goes on although it
    was to end: libraries may swallow what a handler raises, or turn it into an error of their own.
    """
    ended: list[BaseException] = []

    def stop(number: int, frame: FrameType | None) -> None:
        ended.append(KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number))
        raise ended[0]

    def check() -> None:
        if ended:
            raise ended[0]

    before = {}
    # Only a main thread may set handlers; elsewhere the caller has its own.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # What is ignored, such as by nohup, stays ignored.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, stop)
    try:
        yield check
    except BaseException as error:
        if not ended and not isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        tell(f"interrupted: {said}")
        check()
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
