"""The headers of PyTorch's stable C++ interface, of a release that is not installed.

pip finds the wheel, wherever it is set up to look, and reads these folders alone out of it: less
than 1 of 530 MB. The classes that do this are pip's own, and internal; 23.2 and 26.3 have the same.
What was read is kept in `build/torch-headers`.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile

from pip._internal.commands import create_command
from pip._internal.exceptions import PipError
from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, LazyZipOverHTTP
from pip._vendor.requests import RequestException

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / "build" / "torch-headers"
# The stable interface includes nothing else.
FOLDERS = tuple(
    f"torch/include/torch/{name}/"
    for name in ("csrc/stable", "csrc/inductor/aoti_torch", "headeronly")
)
SECONDS = "15"


class Unavailable(Exception):
    """One sentence that says why there are no headers."""


def oldest() -> str:
    """Return the oldest release that pyproject.toml allows, such as 2.11.0."""
    found = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert found, "pyproject.toml does not name the oldest torch as torch>=2.11"
    return f"{found[1]}.0"


def newest() -> str:
    """Return the newest final release for this Python and platform; Unavailable without one."""
    with _pip() as (_, wheels):
        return max(wheel.version for wheel in wheels).public


def headers(release: str) -> Path:
    """Return a folder that holds the release's `include`, as that of an installed torch does.

    Raises Unavailable where no index that pip is set up for answers or has the release.
    """
    folder = CACHE / release
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with _pip() as (session, wheels), tempfile.TemporaryDirectory(dir=CACHE) as unpacked:
        links = [wheel.link for wheel in wheels if wheel.version.public == release]
        if not links:
            raise Unavailable(f"pip finds no wheel of torch {release} for this Python and platform")
        with closing(_wheel(links[-1], session)) as stream, ZipFile(stream) as wheel:
            members = [item for item in wheel.infolist() if item.filename.startswith(FOLDERS)]
            starts = [item.header_offset for item in members]
            # They lie together: one request for all instead of one for each.
            stream.seek(min(starts))
            stream.read(max(starts) - min(starts))
            wheel.extractall(unpacked, members)
        # Another process may have been faster.
        if not folder.is_dir():
            Path(unpacked, "torch").rename(folder)
    return folder


@contextmanager
def _pip() -> Iterator[tuple[Any, list[Any]]]:
    """Give pip's session and the wheels of torch that it finds, final releases alone."""
    command = create_command("index")
    options, _ = command.parse_args(["versions", "torch", "--retries=0", f"--timeout={SECONDS}"])
    try:
        with command.main_context(), command._build_session(options) as session:
            found = command._build_package_finder(options, session).find_all_candidates("torch")
            wheels = [each for each in found if not each.version.is_prerelease]
            if not wheels:
                raise Unavailable("no index that pip is set up for answers with wheels of torch")
            yield session, wheels
    except (PipError, RequestException) as error:
        raise Unavailable(f"pip cannot read torch's wheel: {error}") from error


def _wheel(link: Any, session: Any) -> IO[bytes]:
    """Open a wheel where it lies; whole only where its server sends no parts."""
    if link.is_file:
        return open(link.file_path, "rb")
    try:
        return LazyZipOverHTTP(link.url_without_fragment, session)
    except HTTPRangeRequestUnsupported:
        whole = tempfile.TemporaryFile()  # noqa: SIM115
        answer = session.get(link.url_without_fragment, stream=True)
        answer.raise_for_status()
        shutil.copyfileobj(answer.raw, whole)
        return whole
