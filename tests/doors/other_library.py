"""Use another library than the installed one, as users can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dsa_tvm.runtime import library


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Every call in this process goes to the library at `path`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSA_TVM_LIBRARY", str(path))
        library.load.cache_clear()
        try:
            yield
        finally:
            library.load.cache_clear()
