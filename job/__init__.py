"""Critic training on a language-model trunk: everything that runs inside the container."""

# Read by any Python, to say that it is too old: no syntax here that is newer than 2.7.
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - that is what is to be said
    sys.stderr.write(
        "error: Python 3.11 or newer is needed; %s is Python %d.%d.%d: name another one, "  # noqa: UP031
        "or call .venv/bin/python after `make run PYTHON=/path/to/python3.11`\n"
        % ((sys.executable,) + tuple(sys.version_info[:3]))  # noqa: RUF005
    )
    sys.exit(78)

from job.common.packages import require

__version__ = "0.2.0"

require("omegaconf")
