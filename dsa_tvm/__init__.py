"""DeepSeek Sparse Attention as a portable, TVM-compiled kernel package.

Importing this package loads neither TVM, torch nor onnxruntime; each name is loaded at its first use.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .errors import ArgumentError, BuildError, DsaError, KernelError, LibraryError
    from .functions import dsa_attention, indexer_topk, lightning_indexer, sparse_mla, sparse_mla_fp8, topk, write_rows
    from .runtime.library import active_target, get_library_path, get_num_threads, set_num_threads
    from .runtime.packing import pack_mla_rows, unpack_mla_rows

try:
    __version__ = version("dsa_tvm")
except PackageNotFoundError:  # a checkout that is not installed: the package's own build
    __version__ = "0"

_HOMES = {
    "errors": ("ArgumentError", "BuildError", "DsaError", "KernelError", "LibraryError"),
    "functions": (
        *("dsa_attention", "indexer_topk", "lightning_indexer", "sparse_mla", "sparse_mla_fp8", "topk"),
        "write_rows",
    ),
    "runtime.library": ("active_target", "get_library_path", "get_num_threads", "set_num_threads"),
    "runtime.packing": ("pack_mla_rows", "unpack_mla_rows"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "ArgumentError",
    "BuildError",
    "DsaError",
    "KernelError",
    "LibraryError",
    "active_target",
    "dsa_attention",
    "get_library_path",
    "get_num_threads",
    "indexer_topk",
    "lightning_indexer",
    "pack_mla_rows",
    "set_num_threads",
    "sparse_mla",
    "sparse_mla_fp8",
    "topk",
    "unpack_mla_rows",
    "write_rows",
]


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value
