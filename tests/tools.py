"""Debian's tools that some tests need, and the marks that skip them where they are missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

LIBFAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))), None)
needs_faketime = pytest.mark.skipif(LIBFAKETIME is None, reason="needs Debian's libfaketime")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs Debian's strace")
