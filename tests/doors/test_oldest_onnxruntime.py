"""The ONNX Runtime tests once more, on the oldest release that is stated to work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OLDEST = "1.20.1"
HERE = Path(__file__).parent


@pytest.mark.skipif(sys.version_info >= (3, 13), reason=f"onnxruntime {OLDEST} has no wheel for this Python")
def test_oldest(tmp_path):
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--target",
        tmp_path,
        f"onnxruntime=={OLDEST}",
    ]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"onnxruntime {OLDEST} cannot be installed here")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = [sys.executable, "-c", "import onnxruntime; print(onnxruntime.__version__)"]
    version = subprocess.run(found, capture_output=True, text=True, env=environment).stdout.split()[-1]
    assert version == OLDEST
    files = [HERE / "test_ort.py", HERE / "test_cache_in_place.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:]
