"""Where the peers live: a cache directory with a venv, node_modules and a Go program of its own."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the tests' helpers: key pairs, ids, connections
PEERS = HERE / "peers"
REQUIREMENTS, MANIFEST = PEERS / "requirements.txt", PEERS / "package.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liveapi-server-bench"

BUILD = f"{platform.python_version()}-{Path(sys.base_prefix).name}"  # of this very interpreter
PEERS_PYTHON = CACHE / f"python-{BUILD}" / "bin/python"
NODE_MODULES = CACHE / "node/node_modules"
GO_PROGRAM = CACHE / "go-peer"

PROGRAMS = {"receiver": ["wrk"], "python": [], "node": ["node", "npm"], "go": ["go"]}
UNSYNCED_FILESYSTEMS = {"tmpfs", "ramfs", "overlay"}


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    """A command's output; SystemExit with what it said if it fails."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def need(*programs: str) -> None:
    if missing := [each for each in programs if not shutil.which(each)]:
        debian = "apt-get install wrk golang-go nodejs npm linux-perf"
        raise SystemExit(f"missing: {', '.join(missing)}; on Debian: {debian}")


def _once(directory: Path, recipe: Path, *commands: Sequence[str | Path]) -> None:
    """Run the commands in `directory` unless they ran for this very recipe before."""
    mark = directory / "installed"
    if mark.exists() and mark.read_bytes() == recipe.read_bytes():
        return
    print(f"installing {recipe.name} in {directory}", file=sys.stderr)
    directory.mkdir(parents=True, exist_ok=True)
    for command in commands:
        run(*command, cwd=directory)
    mark.write_bytes(recipe.read_bytes())


def prepare(kinds: set[str]) -> None:
    """Install and build what servers of these kinds need."""
    CACHE.mkdir(parents=True, exist_ok=True)
    need(*(program for kind in kinds for program in PROGRAMS[kind]))
    if "python" in kinds:
        pip = [PEERS_PYTHON, *"-m pip install -q --upgrade -r".split(), REQUIREMENTS]
        _once(PEERS_PYTHON.parent.parent, REQUIREMENTS, [sys.executable, "-m", "venv", "."], pip)
    if "node" in kinds:
        npm = ["npm", "install", "--no-audit", "--no-fund"]
        _once(NODE_MODULES.parent, MANIFEST, ["cp", MANIFEST, "."], npm)
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
