"""What an exception says, in a few words for a message."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """Say in a few words what an exception says."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    return str(error).splitlines()[0] if str(error).strip() else type(error).__name__
