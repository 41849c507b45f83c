"""Find, verify and load the compiled library, without TVM."""

from __future__ import annotations

import ctypes
import functools
import json
import os
from pathlib import Path
from typing import NoReturn

from ..errors import ArgumentError, KernelError, LibraryError
from ..ops import OPS
from . import loading, package_files, verified
from .integers import as_integer

#: DSA_TVM_ABI_VERSION of the header that this code was written for.
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
    "peak",
    "plan_create",
    "plan_destroy",
    "prepare",
    "prepare_objects",
    "read_rate",
    "run",
    "run_objects",
    "set_num_threads",
    "target",
    "version",
    "workspace_size",
)
#: What a ``dsa_tvm_status`` is in Python; any other is a `KernelError`.
_STATUS_ERRORS = {1: ArgumentError, 3: LibraryError}


def exported_symbols() -> list[str]:
    """Every symbol the library exports, sorted."""
    return sorted(["RegisterCustomOps", *(f"dsa_tvm_{name}" for name in (*_FUNCTIONS, *OPS))])


def default_path() -> Path:
    """The path in ``$DSA_TVM_LIBRARY``, otherwise that of the library which was installed with the package."""
    override = os.environ.get("DSA_TVM_LIBRARY")
    return Path(override) if override else package_files.find(f"lib/{LIBRARY_NAME}")


def verify(path: Path) -> dict:
    """Check a library against the manifest beside it, without loading it.

    A file that has not changed since the last time is not read again, see `verified`.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    LibraryError
        There is no library or no manifest, the manifest cannot be read, or the ABI, the size or the digest differ.
    """
    descriptor, manifest = _open_verified(path)
    os.close(descriptor)
    return manifest


def _open_verified(path: Path) -> tuple[int, dict]:
    """Open a library and check it as `verify` does. Returns the descriptor and the manifest."""
    try:
        descriptor = loading.open_file(path)
    except OSError as error:
        got = "none" if isinstance(error, FileNotFoundError) else error.strerror
        expected = f"library: expected a file at {path}, got {got}"
        raise LibraryError(f"{expected}; reinstall dsa_tvm or run dsa-tvm build") from error
    try:
        return descriptor, _check(descriptor, path)
    except BaseException:
        os.close(descriptor)
        raise


def _check(descriptor: int, path: Path) -> dict:
    manifest_path = path.parent / MANIFEST_NAME
    try:
        manifest = json.loads(manifest_path.read_bytes())
        abi, size, digest = manifest["abi"], manifest["size"], manifest["sha256"]
    except FileNotFoundError as error:
        raise LibraryError(f"library: expected its manifest at {manifest_path}, got none") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LibraryError(f"library: expected a manifest at {manifest_path}, got one that cannot be read") from error
    if abi != ABI_VERSION:
        raise LibraryError(f"library: expected ABI {ABI_VERSION}, got {abi} in {manifest_path}")
    # The size comes first: the loader maps a truncated library and dies of SIGBUS.
    found = os.fstat(descriptor)
    if found.st_size != size:
        raise LibraryError(f"library: expected {size} bytes, got {found.st_size} at {path}: it is damaged")
    if not verified.is_known(found, digest):
        actual = loading.sha256(descriptor)
        if actual != digest:
            raise LibraryError(f"library: expected sha256 {digest}, got {actual} at {path}: it is damaged")
        verified.remember(found, digest)
    return manifest


def get_library_path(path: str | os.PathLike[str] | None = None) -> str:
    """Path of the verified library, for ``SessionOptions.register_custom_ops_library``.

    ONNX Runtime opens the path again, and nobody checks what it finds there. Let only people you trust write to the
    folder.

    Parameters
    ----------
    path : path-like, optional
        A library made by ``dsa-tvm build``; by default `default_path`.

    Raises
    ------
    LibraryError
        The library or its manifest is missing, damaged or of another ABI.
    """
    found = Path(path) if path is not None else default_path()
    verify(found)
    return str(found)


@functools.cache
def load(path: str | None = None) -> ctypes.CDLL:
    """Verify and load the library.

    The very file that was verified is loaded, whatever happens to its path meanwhile.

    Raises
    ------
    LibraryError
        The library or its manifest is missing, damaged or of another ABI; the loader refuses it; or it has no kernels
        for this CPU or for ``$DSA_TVM_TARGET``.
    """
    found = Path(path) if path is not None else default_path()
    descriptor, _ = _open_verified(found)
    try:
        library = loading.load(descriptor, str(found))
    except OSError as error:
        raise LibraryError(f"library: {found}: {error}") from error
    library.dsa_tvm_last_error.restype = ctypes.c_char_p
    library.dsa_tvm_target.restype = ctypes.c_char_p
    library.dsa_tvm_version.restype = ctypes.c_char_p
    # Libraries of earlier versions lack these.
    if hasattr(library, "dsa_tvm_cuda_archs"):
        library.dsa_tvm_cuda_archs.restype = ctypes.c_char_p
    if hasattr(library, "dsa_tvm_plan_create"):
        library.dsa_tvm_plan_create.restype = ctypes.c_void_p
        library.dsa_tvm_plan_destroy.argtypes = (ctypes.c_void_p,)
        library.dsa_tvm_plan_destroy.restype = None
    library.dsa_tvm_set_num_threads.restype = None
    if library.dsa_tvm_abi_version() != ABI_VERSION:
        raise LibraryError(f"library: expected ABI {ABI_VERSION}, got {library.dsa_tvm_abi_version()} at {found}")
    if library.dsa_tvm_target() is None:
        raise LibraryError(library.dsa_tvm_last_error().decode())
    return library


def raise_error(library: ctypes.CDLL, status: int) -> NoReturn:
    """Raise what a function of the library has returned, with its message."""
    raise _STATUS_ERRORS.get(status, KernelError)(library.dsa_tvm_last_error().decode())


@functools.cache
def has_cuda(library: ctypes.CDLL) -> bool:
    """Whether a loaded library has CUDA kernels, whether or not there is a GPU."""
    return hasattr(library, "dsa_tvm_cuda_archs") and library.dsa_tvm_cuda_archs() is not None


def cuda_archs() -> tuple[str, ...]:
    """The GPU architectures that the library has kernels for, such as ``sm_90``. Empty if it was built without CUDA.

    The last one, such as ``compute_80``, stands for PTX, which the driver compiles for all later architectures.
    """
    library = load()
    return tuple(library.dsa_tvm_cuda_archs().decode().split(",")) if has_cuda(library) else ()


def active_target() -> str:
    """The CPU target whose kernels are in use, such as ``x86-64-v3``."""
    return load().dsa_tvm_target().decode()


def set_num_threads(num_threads: int) -> None:
    """Set the most threads that later calls in this process use, including the calling thread.

    Short calls use one. Results do not depend on the number. ONNX Runtime's nodes use the threads of their session
    instead.

    Parameters
    ----------
    num_threads : int
        Numbers above 1024 count as 1024. 0 stands for the value that ``$OMP_NUM_THREADS`` had when the library was
        loaded, otherwise for the CPUs of this process: those of its affinity mask, or of the CPU quota of its cgroup
        if these are fewer.

    Raises
    ------
    ArgumentError
        `num_threads` is not an integer, is negative, or does not fit 32 bits.
    LibraryError
        The library cannot be loaded, see `load`.
    """
    number = as_integer("set_num_threads", "num_threads", num_threads)
    if not 0 <= number < 2**31:
        raise ArgumentError(f"set_num_threads: num_threads: expected 0..{2**31 - 1}, got {number}")
    load().dsa_tvm_set_num_threads(number)


def get_num_threads() -> int:
    """The most threads that a call uses, unless its ``num_threads`` says otherwise."""
    return load().dsa_tvm_get_num_threads()
