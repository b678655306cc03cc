"""All checks of lorakit: `nox` runs them all, `nox -s NAME` one, `nox -l` lists them."""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.options.sessions = ["lint", "tests", "guests"]
nox.options.reuse_existing_virtualenvs = True

CONSTRAINTS = ("-c", "constraints.txt")
GUESTS = sorted(path.parent.name for path in Path("plugins").glob("*/pyproject.toml"))


def install(session: nox.Session, *packages: str) -> None:
    """Install packages at the tested versions."""
    session.install(*CONSTRAINTS, *packages)
    session.env["HF_HUB_OFFLINE"] = "1"
    # Several test processes, each with a thread for every core, would wait for each other.
    session.env["OMP_NUM_THREADS"] = "1"


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, and the direction of imports."""
    install(session, "-e", ".[lint,test]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones; arguments after `--` go to pytest."""
    install(session, "-e", ".[test]")
    session.run("pytest", "-m", "not slow", *(session.posargs or ["-n", "2", "--dist", "worksteal"]))


@nox.session
def guests(session: nox.Session) -> None:
    """Each plugin in `plugins/`, beside lorakit and without the others, with its own tests; names after `--` choose."""
    install(session, "-e", ".[test]")
    for guest in session.posargs or GUESTS:
        session.run("python", "-m", "pip", "uninstall", "--yes", "-qq", *GUESTS)
        session.install(*CONSTRAINTS, f"./plugins/{guest}[test]")
        session.run("pytest", f"plugins/{guest}/tests")


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that take minutes."""
    install(session, "-e", ".[test]")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def fuzz(session: nox.Session) -> None:
    """Try 5000 damaged files and lines of each kind; an argument after `--` says how many instead."""
    install(session, "-e", ".[test]")
    session.env["LORAKIT_FUZZ"] = session.posargs[0] if session.posargs else "5000"
    session.run("pytest", "tests/fuzz", "-n", "2", "--dist", "worksteal")


@nox.session
def faults(session: nox.Session) -> None:
    """Kill runs 100 times at random moments, and let every write fail: ten minutes. LORAKIT_KILLS says how often."""
    install(session, "-e", ".[test]")
    session.env.setdefault("LORAKIT_KILLS", os.environ.get("LORAKIT_KILLS", "100"))
    session.run("pytest", "tests/faults", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Whether memory, open files and speed stay flat over 20 000 steps: 12 minutes. Arguments after `--` go to it."""
    install(session, "-e", ".[test]")
    session.run("python", "benchmarks/soak.py", *session.posargs)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a LoRA on 18 images with a tiny model; arguments after `--` go to `lorakit train`."""
    install(session, "-e", ".[all]")
    session.env.pop("OMP_NUM_THREADS")
    session.run("lorakit", "train", "examples/quickstart/config.toml", *session.posargs)
    session.log("before and after: examples/quickstart/out/sample/zorp_contact_sheet.png")


@nox.session
def learning(session: nox.Session) -> None:
    """Train the quick start in many ways and examine each LoRA: an hour. Arguments after `--` choose optimizers."""
    install(session, "-e", ".[test]")
    session.run("python", "benchmarks/learning.py", *session.posargs)
