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
PEERS = HERE / "peers"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "liveapi-server-bench"

BUILD = f"{platform.python_version()}-{Path(sys.base_prefix).name}"  # of this very interpreter
PEERS_PYTHON = CACHE / f"python-{BUILD}" / "bin/python"
NODE_MODULES = CACHE / "node/node_modules"
GO_PROGRAM = CACHE / "go-peer"

DEBIAN_PACKAGES = {"wrk": "wrk", "go": "golang-go", "node": "nodejs", "npm": "npm"}
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


def _need_programs(names: set[str]) -> None:
    """Install what is missing from Debian, or say what to install."""
    missing = sorted(DEBIAN_PACKAGES[name] for name in names if not shutil.which(name))
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
    _need_programs(set().union(*(PROGRAMS[kind] for kind in kinds)))
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


def python_facts(python: Path) -> dict[str, object]:
    code = """if True:
        import json, sys, cryptography
        gil = getattr(sys, "_is_gil_enabled", lambda: True)()
        print(json.dumps({"python": sys.version.split()[0], "gil": gil,
                          "cryptography": cryptography.__version__}))"""
    facts: dict[str, object] = json.loads(run(python, "-c", code))
    return facts


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def filesystem(directory: Path) -> str:
    return run("findmnt", "--noheadings", "--output", "FSTYPE", "--target", directory).strip()


def facts(python: Path, directory: Path) -> dict[str, object]:
    """What the figures were measured on."""
    kind = filesystem(directory)
    if kind in UNSYNCED_FILESYSTEMS:
        print(f"WARNING: {directory} is on {kind}: a sync there may cost nothing", file=sys.stderr)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "filesystem": kind,
        "receiver": {**python_facts(python), "path": str(python)},
    }


def versions(kinds: set[str]) -> dict[str, str]:
    """The versions of what the servers of these kinds are made of."""
    found = {}
    if "python" in kinds:
        found["peers' python"] = run(PEERS_PYTHON, "-V").split()[1]
        wanted = (PEERS / "requirements.txt").read_text().split()
        for line in run(PEERS_PYTHON, "-m", "pip", "freeze").splitlines():
            name, _, version = line.partition("==")
            if name.lower() in wanted:
                found[name.lower()] = version
    if "node" in kinds:
        found["node"] = run("node", "--version").strip().removeprefix("v")
        for name in json.loads((PEERS / "package.json").read_text())["dependencies"]:
            manifest = NODE_MODULES / name / "package.json"
            found[name] = json.loads(manifest.read_text())["version"]
    if "go" in kinds:
        found["go"] = run("go", "version").split()[2].removeprefix("go")
    return found
