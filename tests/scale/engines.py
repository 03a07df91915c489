"""What these tests share: the README's commands, and the programs that they need."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from harness import ROOT
from pages import examples, replaced

HERE = Path(__file__).resolve().parent
CHECK = "re.notifica.event.custom.liveapi_check"  # what `check` sends
HOUR = 3_600_000
MIDNIGHT = 1_763_856_000_000  # 2025-11-23


def documented_command(start: str, changes: dict[str, str]) -> str:
    """The README's one command that begins with `start`, on one line and with the changes made."""
    lines = re.sub(r"\\\n *", "", "".join(examples(page="tests/scale/README.md"))).splitlines()
    [found] = [line for line in lines if line.startswith(start)]
    return replaced(found, changes)


def duckdb_rows(query: Path, directory: Path) -> list[list[Any]]:
    """What the README's command for DuckDB finds with `query`, as rows in place of a table."""
    interpreter = "/opt/duckdb/bin/python"
    found = "json.dumps(duckdb.sql(sys.stdin.read()).fetchall(), default=str)"
    changes = {
        interpreter: f"'{python_with('duckdb')}'",
        "duckdb.sql(sys.stdin.read()).show(max_rows=1000)": f"import json; print({found})",
        "tests/scale/opens_per_notification.sql": f"'{query}'",
    }
    command = documented_command(interpreter, changes)
    done = subprocess.run(
        command, shell=True, stdout=subprocess.PIPE, cwd=directory, timeout=60, check=True
    )
    rows: list[list[Any]] = json.loads(done.stdout)
    return rows


def need(program: str, package: str) -> str:
    """The program's path, or a skip that says what to install."""
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if not found:
        pytest.skip(f"{program} is missing: apt-get install {package}")
    return found


def python_with(module: str) -> str:
    """A Python that has `module`: .venv-scale's, for Spark is larger than all else, or this one."""
    own = ROOT / ".venv-scale/bin/python"
    python = str(own if own.exists() else sys.executable)
    if subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode:
        pytest.skip(f"{python} has no {module}: pip install {module}")
    return python
