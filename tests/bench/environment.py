"""Where the peers live: a cache directory with a venv, node_modules and a Go program of its own."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the tests' helpers: key pairs, ids, connections
PEERS = HERE / "peers"
REQUIREMENTS, MANIFEST = PEERS / "requirements.txt", PEERS / "package.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liveapi-server-bench"

BUILD = f"{platform.python_version()}-{Path(sys.base_prefix).name}"  # of this very interpreter
PEERS_PYTHON = CACHE / f"python-{BUILD}" / "bin/python"
NODE = CACHE / "node"
NODE_MODULES = NODE / "node_modules"
GO_PROGRAM = CACHE / "go-peer"

UNSYNCED_FILESYSTEMS = {"tmpfs", "ramfs", "overlay"}


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """A command's output; SystemExit with what it said if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def prepare(kinds: set[str]) -> None:
    """Install and build what servers of these kinds need, and is not there yet."""
    NODE.mkdir(parents=True, exist_ok=True)
    if "python" in kinds:
        if not PEERS_PYTHON.exists():
            run(sys.executable, "-m", "venv", PEERS_PYTHON.parent.parent)
        run(PEERS_PYTHON, *"-m pip install -q -r".split(), REQUIREMENTS)
    if "node" in kinds:
        shutil.copy(MANIFEST, NODE)
        run(*"npm install --no-audit --no-fund".split(), cwd=NODE)
    if "go" in kinds:
        build = ("go", "build", "-o", GO_PROGRAM, PEERS / "main.go")
        run(*build, GOCACHE=str(CACHE / "go-build"), GO111MODULE="off")


def python_facts(python: str | Path, *packages: str) -> str:
    code = """if True:
        import platform, sys
        from importlib.metadata import version
        packages = (f"{name} {version(name)}" for name in sys.argv[1:])
        print(f"Python {platform.python_version()}", *packages, sep=", ")
    """
    return run(python, "-c", code, *packages).strip()


def machine(directory: Path) -> str:
    """What the figures were measured on."""
    kind = run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory).strip()
    if kind in UNSYNCED_FILESYSTEMS:
        print(f"WARNING: {directory} is on {kind}: a sync there may cost nothing", file=sys.stderr)
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = model[1] if model else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), Linux {platform.release()}, {kind}"


def versions(kinds: set[str]) -> str:
    """The versions of what the servers of these kinds are made of."""
    found = []
    if "python" in kinds:
        found.append(python_facts(PEERS_PYTHON, *REQUIREMENTS.read_text().split()))
    if "node" in kinds:
        found.append(f"node {run('node', '--version').strip()}")
        for name in json.loads(MANIFEST.read_text())["dependencies"]:
            manifest = json.loads((NODE_MODULES / name / "package.json").read_text())
            found.append(f"{name} {manifest['version']}")
    if "go" in kinds:
        found.append(run("go", "version").split()[2])
    return ", ".join(found)
