"""Where the peers live: a cache directory with a venv, node_modules and a Go program of its own."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # the tests' harness: key pairs, ids
PEERS = HERE / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liveapi-server-bench"

BUILD = f"{platform.python_version()}-{Path(sys.base_prefix).name}"  # of this very interpreter
PEERS_PYTHON = CACHE / f"python-{BUILD}" / "bin/python"
NODE_MODULES = CACHE / "node/node_modules"
GO_PROGRAM = CACHE / "go-peer"

DEBIAN_PACKAGES = {"go": "golang-go", "node": "nodejs", "perf": "linux-perf"}  # else its name
PROGRAMS = {"receiver": {"wrk"}, "python": set(), "node": {"node", "npm"}, "go": {"go"}}
UNSYNCED_FILESYSTEMS = {"tmpfs", "ramfs", "overlay"}


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """A command's output; SystemExit with what it said if it fails."""
    environment = {**os.environ, **(env or {})}
    done = subprocess.run(
        command, check=False, cwd=cwd, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}:\n{done.stdout}{done.stderr}")
    return done.stdout


def need_programs(names: set[str]) -> None:
    """Install what is missing from Debian, or say what to install."""
    missing = sorted(DEBIAN_PACKAGES.get(each, each) for each in names if not shutil.which(each))
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise SystemExit(f"the benchmark needs: apt-get install {' '.join(missing)}")
    print(f"installing {' '.join(missing)}", file=sys.stderr)
    run("apt-get", "update")
    run("apt-get", "install", "-y", "--no-install-recommends", *missing)


def _once(directory: Path, recipe: Path, *commands: list[str]) -> None:
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
    need_programs(set().union(*(PROGRAMS[kind] for kind in kinds)))
    if "python" in kinds:
        recipe = PEERS / "requirements.txt"
        venv = [sys.executable, "-m", "venv", "."]
        pip = [str(PEERS_PYTHON), "-m", "pip", "install", "-q", "--upgrade", "-r", str(recipe)]
        _once(PEERS_PYTHON.parent.parent, recipe, venv, pip)
    if "node" in kinds:
        recipe = PEERS / "package.json"
        npm = ["npm", "install", "--no-audit", "--no-fund"]
        _once(NODE_MODULES.parent, recipe, ["cp", str(recipe), "."], npm)
    if "go" in kinds:
        env = {"GOCACHE": str(CACHE / "go-build"), "GO111MODULE": "off"}
        run("go", "build", "-o", GO_PROGRAM, PEERS / "main.go", env=env)


def receiver_python(wanted: str) -> Path:
    """The interpreter asked for; if it has no cryptography, a venv of it that has."""
    python = shutil.which(wanted)
    if not python:
        raise SystemExit(f"--python {wanted}: there is no such program")
    probe = [python, "-c", "import cryptography"]
    if subprocess.run(probe, check=False, capture_output=True).returncode == 0:
        return Path(python).absolute()  # not resolved: a link in a venv stands for the venv
    tag = run(python, "-c", "import sysconfig; print(sysconfig.get_config_var('SOABI'))").strip()
    home = CACHE / f"receiver-{tag}"
    if not (home / "installed").exists():
        run(python, "-m", "venv", home)
        run(home / "bin/python", "-m", "pip", "install", "-q", "cryptography")
        (home / "installed").touch()
    return home / "bin/python"


def python_facts(python: Path) -> str:
    code = """if True:
        import platform, sys, cryptography
        free = "" if getattr(sys, "_is_gil_enabled", lambda: True)() else ", free-threaded"
        print(f"Python {platform.python_version()}{free}, cryptography {cryptography.__version__}")
    """
    return run(python, "-c", code).strip()


def machine(directory: Path) -> str:
    """What the figures were measured on."""
    kind = run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory).strip()
    if kind in UNSYNCED_FILESYSTEMS:
        print(f"WARNING: {directory} is on {kind}: a sync there may cost nothing", file=sys.stderr)
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({cpu}), Linux {platform.release()}, {kind}"


def versions(kinds: set[str]) -> str:
    """The versions of what the servers of these kinds are made of."""
    found = []
    if "python" in kinds:
        wanted = (PEERS / "requirements.txt").read_text().split()
        frozen = run(PEERS_PYTHON, "-m", "pip", "freeze").lower().splitlines()
        found += [run(PEERS_PYTHON, "-V").strip()]
        found += [line.replace("==", " ") for line in frozen if line.partition("==")[0] in wanted]
    if "node" in kinds:
        found.append(f"node {run('node', '--version').strip()}")
        for name in json.loads((PEERS / "package.json").read_text())["dependencies"]:
            manifest = json.loads((NODE_MODULES / name / "package.json").read_text())
            found.append(f"{name} {manifest['version']}")
    if "go" in kinds:
        found.append(run("go", "version").split()[2])
    return ", ".join(found)
