"""Lint, format and types."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ["dsa_tvm", "schedules", "export", "tests"]


def run(*command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_ruff(command):
    pytest.importorskip("ruff")
    run("ruff", *command, "--no-cache", *SOURCES)


def test_types(tmp_path):
    """Checks the installed layout, in which relative imports between the top-level folders resolve."""
    pytest.importorskip("mypy")
    package = tmp_path / "dsa_tvm"
    shutil.copytree(ROOT / "dsa_tvm", package)
    for name in ("schedules", "export"):
        shutil.copytree(ROOT / name, package / name)
    config = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path / "cache")]
    run("mypy", *config, str(package))


def test_the_readme_has_the_two_commands():
    blocks = (ROOT / "README.md").read_text().split("```sh\n")[1:3]
    assert "dsa-tvm demo" in blocks[0] and "pytest" in blocks[1]
