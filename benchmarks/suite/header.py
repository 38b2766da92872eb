"""The first line of the records: machine, versions, commit, date."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

from suite.plan import ROOT
from suite.processes import child_environment
from suite.records import Record

_CODE = """
import json, torch
from lemma_fast.bench.environment import environment
device = "cuda" if torch.cuda.is_available() else "cpu"
print(json.dumps(environment(torch.device(device))))
"""


def header(folder: Path, command: str, budget: float) -> Record:
    """What the numbers that follow are measured with; where torch does not start, why."""
    about: Record = {"command": command, "budget": budget, "argv": sys.argv[1:]}
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _CODE],
            env=child_environment(folder),
            capture_output=True,
            text=True,
            timeout=90,
            check=True,
            cwd=ROOT,
        )
        about["environment"] = json.loads(ran.stdout.splitlines()[-1])
    except (subprocess.SubprocessError, OSError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", None) or str(error)
        about["environment"] = {
            "device": "unknown",
            "device_type": "unknown",
            "error": str(said)[-500:],
            "commit": os.environ.get("LEMMA_FAST_COMMIT"),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "versions": {},
            "threads": os.cpu_count(),
        }
    return about
