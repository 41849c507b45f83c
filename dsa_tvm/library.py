"""Find, verify and load the compiled library. Never imports TVM."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path

from . import forks
from .errors import ArgumentError, LibraryError
from .files import sha256
from .integers import as_integer
from .ops import OPS

#: DSA_TVM_ABI_VERSION of the header this Python code was written for.
ABI_VERSION = 1
LIBRARY_NAME = "libdsa_tvm.so"
MANIFEST_NAME = "manifest.json"

_FUNCTIONS = (
    "abi_version",
    "call",
    "cuda_archs",
    "get_num_threads",
    "last_error",
    "output_shapes",
    "set_num_threads",
    "target",
    "version",
    "workspace_size",
)


def exported_symbols() -> list[str]:
    """Every symbol the library exports, sorted."""
    return sorted(["RegisterCustomOps", *(f"dsa_tvm_{name}" for name in (*_FUNCTIONS, *OPS))])


def default_path() -> Path:
    """Where the library is looked for: ``$DSA_TVM_LIBRARY``, else the one that was installed with the package."""
    override = os.environ.get("DSA_TVM_LIBRARY")
    return Path(override) if override else Path(__file__).parent / "lib" / LIBRARY_NAME


def verify(path: Path) -> dict:
    """Check a library against the manifest beside it, without loading it.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    LibraryError
        No library or manifest, a manifest that is no JSON object of the right fields, another ABI, size or digest.
    """
    manifest_path = path.parent / MANIFEST_NAME
    if not path.is_file():
        raise LibraryError(f"library: expected a file at {path}, got none; reinstall dsa_tvm or run dsa-tvm build")
    try:
        manifest = json.loads(manifest_path.read_bytes())
        abi, size, digest = manifest["abi"], manifest["size"], manifest["sha256"]
    except FileNotFoundError as error:
        raise LibraryError(f"library: expected its manifest at {manifest_path}, got none") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LibraryError(f"library: expected a manifest at {manifest_path}, got one that cannot be read") from error
    if abi != ABI_VERSION:
        raise LibraryError(f"library: expected ABI {ABI_VERSION}, got {abi} in {manifest_path}")
    # Size first: the loader maps a truncated library and dies of SIGBUS, and so would reading on.
    actual = path.stat().st_size
    if actual != size:
        raise LibraryError(f"library: expected {size} bytes, got {actual} at {path}: it is damaged")
    actual_digest = sha256(path)
    if actual_digest != digest:
        raise LibraryError(f"library: expected sha256 {digest}, got {actual_digest} at {path}: it is damaged")
    return manifest


def get_library_path(path: str | os.PathLike[str] | None = None) -> str:
    """Path of the verified library, for ``SessionOptions.register_custom_ops_library``.

    Parameters
    ----------
    path : path-like, optional
        A library made by ``dsa-tvm build``; by default `default_path`.

    Raises
    ------
    LibraryError
        As `verify`.
    """
    found = Path(path) if path is not None else default_path()
    verify(found)
    return str(found)


@functools.cache
def load(path: str | None = None) -> ctypes.CDLL:
    """The library, verified, loaded and able to run on this CPU.

    Raises
    ------
    LibraryError
        As `verify`; or the loader refuses it; or it has no kernels for this CPU or for ``$DSA_TVM_TARGET``.
    """
    found = get_library_path(path)
    try:
        library = ctypes.CDLL(found)
    except OSError as error:
        raise LibraryError(f"library: {error}") from error
    library.dsa_tvm_last_error.restype = ctypes.c_char_p
    library.dsa_tvm_target.restype = ctypes.c_char_p
    library.dsa_tvm_version.restype = ctypes.c_char_p
    if hasattr(library, "dsa_tvm_cuda_archs"):  # one built by an earlier version lacks it, and serves the CPU
        library.dsa_tvm_cuda_archs.restype = ctypes.c_char_p
    library.dsa_tvm_set_num_threads.restype = None
    if library.dsa_tvm_abi_version() != ABI_VERSION:
        raise LibraryError(f"library: expected ABI {ABI_VERSION}, got {library.dsa_tvm_abi_version()} at {found}")
    if library.dsa_tvm_target() is None:
        raise LibraryError(library.dsa_tvm_last_error().decode())
    return library


@functools.cache
def has_cuda(library: ctypes.CDLL) -> bool:
    """Whether a loaded library has CUDA kernels; not whether there is a GPU."""
    return hasattr(library, "dsa_tvm_cuda_archs") and library.dsa_tvm_cuda_archs() is not None


def cuda_archs() -> tuple[str, ...]:
    """The GPU architectures the library has kernels for, such as ``sm_90``; none where it was built without.

    The last, such as ``compute_80``, is the first of those that a driver compiles the kernels for itself.
    """
    library = load()
    return tuple(library.dsa_tvm_cuda_archs().decode().split(",")) if has_cuda(library) else ()


def active_target() -> str:
    """The kernels in use, such as ``x86-64-v3``."""
    return load().dsa_tvm_target().decode()


def set_num_threads(num_threads: int) -> None:
    """Threads of every later call in this process; 0 for as many as OpenMP gives.

    A process forked from one that had imported this package computes on the calling thread alone, whatever is set.

    Raises
    ------
    ArgumentError
        No integer, or one that is negative or has more than 32 bits.
    LibraryError
        As `load`.
    """
    number = as_integer("set_num_threads", "num_threads", num_threads)
    if not 0 <= number < 2**31:
        raise ArgumentError(f"set_num_threads: num_threads: expected 0..{2**31 - 1}, got {number}")
    load().dsa_tvm_set_num_threads(number)


def get_num_threads() -> int:
    """Threads a call uses now."""
    library = load()
    return 1 if forks.in_child() else library.dsa_tvm_get_num_threads()
