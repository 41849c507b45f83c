"""Packages that only some commands need: the extras of pyproject.toml."""

from __future__ import annotations

import importlib.util
import os
import sys

from ..errors import DsaError


def expect_installed(what: str, extra: str, *modules: str) -> None:
    """Check that the modules of an extra are installed, without importing them.

    Parameters
    ----------
    what : str
        The command that needs them.
    extra : str
        The name of the extra in pyproject.toml.
    modules : str
        Names to import.

    Raises
    ------
    DsaError
        Some of them are missing. The message says how to install them.
    """
    missing = [name for name in modules if not _is_installed(name)]
    if missing:
        raise DsaError(
            f"{what}: expected {', '.join(missing)} to be installed, got none; pip install 'dsa_tvm[{extra}]'"
        )


def keep_tvm_from_torch() -> None:
    """Call this before ``import tvm``.

    Where torch is installed, TVM would compile an extension for it at import, which takes a minute.
    """
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")


def _is_installed(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None
