"""Lets a process stay for a while at a moment that is over too soon to be seen from outside."""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

_SECONDS = "0.2"


def if_asked() -> None:
    """Wait ($DWELL_SECONDS) before each renaming of what $DWELL_AT_RENAME matches."""
    if pattern := os.environ.pop("DWELL_AT_RENAME", None):
        found = re.compile(pattern)
        seconds = float(os.environ.pop("DWELL_SECONDS", _SECONDS))

        def wait(event: str, arguments: Any) -> None:
            if event == "os.rename" and any(found.search(str(path)) for path in arguments[:2]):
                time.sleep(seconds)

        sys.addaudithook(wait)
