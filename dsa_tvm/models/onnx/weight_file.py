"""The file of an exported model's weights, written tensor by tensor and read through a mapping.

A model of mapped tensors takes memory for what somebody looks at, and whoever makes a graph of it looks at shapes. So
the weights of a model that does not fit into memory go into their file first, and the graph is made of the mapped ones.
Constant folding transposes most of them, which changes nothing but strides; `store` then puts them in order.
"""

from __future__ import annotations

import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

Array = np.ndarray[Any, Any]

#: ONNX Runtime maps external data at multiples of a page.
_PAGE = 4096
#: What of a tensor is copied at a time.
_PIECE_BYTES = 32 << 20


class Place(NamedTuple):
    """Where a tensor is in the file, in bytes."""

    offset: int
    length: int


class WeightFile:
    """A new file of tensors.

    Parameters
    ----------
    path : Path
        It must not exist.
    """

    def __init__(self, path: Path):
        self._file = open(path, "x+b")  # noqa: SIM115  # closed by `close`
        self._map: mmap.mmap | None = None
        self._mapped: dict[int, Place] = {}

    def add(self, pieces: Iterable[Array]) -> Place:
        """Write a tensor that comes in pieces, which follow one another in memory.

        Raises
        ------
        OSError
            A full disk, for example.
        """
        offset = self._file.seek(0, os.SEEK_END)
        offset += self._file.write(bytes(-offset % _PAGE))
        length = sum(self._file.write(np.ascontiguousarray(piece).data.cast("B")) for piece in pieces)
        return Place(offset, length)

    def mapped(self, place: Place, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the file with the shape and element type of `like`. It is read when somebody uses it.

        Tensors that are added later cannot be mapped.
        """
        if self._map is None:
            self._file.flush()
            self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the mapping is read-only, and nobody writes to it
            x = torch.frombuffer(self._map, dtype=like.dtype, count=like.numel(), offset=place.offset).view(like.shape)
        self._mapped[x.data_ptr()] = place
        return x

    def store(self, tensors: Mapping[str, Array]) -> dict[str, Place]:
        """Put tensors into the file, in C order.

        Parameters
        ----------
        tensors : mapping of str to ndarray
            What lies in the file already keeps its place, and is put in order there if it is a mapped tensor with its
            dimensions permuted. That takes the memory of a matrix. Other tensors are added.

        Returns
        -------
        places : dict of str to Place
        """
        orders: dict[int, set[tuple[int, ...]]] = {}
        for x in tensors.values():
            orders.setdefault(_address(x), set()).add(x.strides)
        places: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Place] = {}
        for x in tensors.values():
            key = (_address(x), x.shape, x.strides)
            if key in places:
                continue
            place = self._mapped.get(_address(x))
            if place is None or place.length != x.nbytes or (not x.flags.c_contiguous and len(orders[key[0]]) > 1):
                place = self.add(_rows(x))
            elif not x.flags.c_contiguous:
                self._put_in_order(x, place.offset)
            places[key] = place
        return {name: places[_address(x), x.shape, x.strides] for name, x in tensors.items()}

    def _put_in_order(self, x: Array, offset: int) -> None:
        if x.strides[0] == x[0].nbytes:
            for i, part in enumerate(x):
                self._put_in_order(part, offset + i * part.nbytes)
            return
        self._file.seek(offset)
        self._file.write(np.ascontiguousarray(x).data.cast("B"))
        self._file.flush()
        first = offset // _PAGE * _PAGE
        assert self._map is not None
        self._map.madvise(mmap.MADV_DONTNEED, first, offset + x.nbytes - first)

    def close(self) -> None:
        """Close the file. Tensors that were mapped stay readable."""
        self._file.close()


def _address(x: Array) -> int:
    return x.__array_interface__["data"][0]


def _rows(x: Array) -> Iterator[Array]:
    if x.ndim == 0:
        yield x
        return
    step = max(1, _PIECE_BYTES // max(1, x[:1].nbytes))
    for first in range(0, len(x), step):
        yield x[first : first + step]
