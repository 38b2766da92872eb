"""SIGTERM, SIGHUP, Ctrl-C: work ends in order, what is done is kept, the exit code says which."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_CAUGHT = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Stopped(BaseException):
    """A signal has come; not an Exception, so that nothing takes it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number
        self.name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        #: What a shell reports of a program that the signal has ended.
        self.code = 128 + number


@contextmanager
def raising() -> Iterator[None]:
    """Inside, a signal raises `Stopped` at once."""

    def stop(number: int) -> None:
        raise Stopped(number)

    with _handled(stop):
        yield


@contextmanager
def held(message: str) -> Iterator[list[int]]:
    """Inside, the first signal is noted in the list that is yielded; the next one is not held.

    `message`, if there is one, is printed on standard error when the first one comes.
    """
    received: list[int] = []

    def note(number: int) -> None:
        if received:
            raise Stopped(number)
        received.append(number)
        if not message:
            return
        # A handler may come between two parts of a print, which os.write does not mind. After a
        # SIGHUP there may be no terminal.
        with suppress(OSError):
            os.write(2, f"\n{Stopped(number).name}: {message}\n".encode())

    with _handled(note):
        yield received


def ignore(*_: object) -> None:
    """For loading processes: who started them says when they end, also where all get a signal."""
    for number in _CAUGHT:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(act: Callable[[int], None]) -> Iterator[None]:
    owner = os.getpid()

    def handler(number: int, _: FrameType | None) -> None:
        # A forked process has inherited this handler, but not the work.
        if os.getpid() == owner:
            act(number)

    before = {}
    # Python hands signals to the main thread alone. Who has ignored a signal (nohup, a shell's
    # background job) goes on ignoring it.
    if threading.current_thread() is threading.main_thread():
        for number in _CAUGHT:
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
