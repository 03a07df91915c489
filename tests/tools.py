"""What some tests need beside Python or time, and the marks that skip them where it is missing.

Debian's packages by their names; npm's are looked for in `node_modules` beside liveapi_server.py,
or where LIVEAPI_NODE_MODULES says: npm install --no-save notificare-live-api-node jose
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT

LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
needs_faketime = pytest.mark.skipif(LIBFAKETIME is None, reason="needs Debian's libfaketime")

FREE_THREADED = not getattr(sys, "_is_gil_enabled", lambda: True)()
WHY_NOT = "a free-threaded Python, whose threads each keep memory that they have freed"
bounds_memory = pytest.mark.skipif(FREE_THREADED, reason=WHY_NOT)

MODULES = Path(os.environ.get("LIVEAPI_NODE_MODULES", ROOT / "node_modules"))


def full(count: int, otherwise: int) -> int:
    """How often a laboratory does something: with LIVEAPI_FULL=1, or without."""
    return count if os.environ.get("LIVEAPI_FULL") == "1" else otherwise


def needs_programs(*names: str) -> Any:
    missing = [each for each in names if shutil.which(each) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")


def needs(package: str) -> Any:
    """The mark of a test that needs node and this package of npm."""
    there = shutil.which("node") is not None and (MODULES / package).is_dir()
    why = f"needs node, and {package} from npm in {MODULES} or LIVEAPI_NODE_MODULES"
    return pytest.mark.skipif(not there, reason=why)
