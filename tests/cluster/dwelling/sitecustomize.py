"""With this folder in its PYTHONPATH, a new process dwells too (see tests/distributed/dwell.py)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "distributed"))
import dwell

del sys.path[0]
dwell.if_asked()
