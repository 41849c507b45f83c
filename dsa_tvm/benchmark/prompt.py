"""Turns a text into inputs of sparse attention. Bytes are tokens, and seeded weights stand in for a trained layer."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import ArgumentError
from ..presets import Preset

#: Large text files of the standard library, the largest first.
_MODULES = ("pydoc_data.topics", "_pydecimal", "turtle", "typing")
_WIDTH = 128
#: The vector of a token includes the bytes before it, each with this factor relative to the next.
_TAPS, _DECAY = 8, 0.75
_POSITION = 0.3


def default_text() -> Path:
    """A text that comes with Python.

    Raises
    ------
    ArgumentError
        None of the known texts exists as a file.
    """
    for name in _MODULES:
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # the parent package
            continue
        if spec and spec.origin and Path(spec.origin).suffix == ".py" and Path(spec.origin).is_file():
            return Path(spec.origin)
    raise ArgumentError(f"demo: expected one of Python's own {', '.join(_MODULES)} as a file, got none; name a text")


def read(path: Path, tokens: int, at_least: int) -> np.ndarray:
    """The first bytes of a file.

    Parameters
    ----------
    path : Path
    tokens : int
        The most bytes to read.
    at_least : int
        The fewest bytes to accept.

    Returns
    -------
    ndarray [at_least..tokens], uint8

    Raises
    ------
    ArgumentError
        The file cannot be read, is empty or too short.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(tokens)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"demo: expected a text file that can be read, got {path}: {error}") from error
    if len(data) < at_least:
        got = "an empty file" if not data else f"{len(data)}"
        raise ArgumentError(f"demo: {path}: expected at least {at_least} bytes, got {got}")
    return np.frombuffer(data, np.uint8)


def size(tokens: int, preset: Preset) -> int:
    """The peak memory of `embed` in bytes, without the queries."""
    return 4 * tokens * (preset.d_idx + 2 * preset.d_qk + 3 * _WIDTH)


@dataclass(frozen=True)
class Prompt:
    """The tensors of one attention layer for a text, float32 and C-contiguous.

    Parameters
    ----------
    index_k : ndarray [n, d_idx]
    kv : ndarray [n, d_qk]
        The caches.
    index_q : ndarray [m, h_idx, d_idx]
    weights : ndarray [m, h_idx]
    q : ndarray [m, h_q, d_qk]
        Queries of the last m tokens.
    """

    index_k: np.ndarray
    kv: np.ndarray
    index_q: np.ndarray
    weights: np.ndarray
    q: np.ndarray

    def feeds(self, first: int, count: int) -> dict[str, np.ndarray]:
        """Inputs of `dsa_attention` for `count` tokens from position `first`, over a cache that ends with them."""
        end = first + count
        rows = slice(first - self._first, end - self._first)
        return {
            "index_q": self.index_q[rows],
            "index_k": self.index_k[:end],
            "weights": self.weights[rows],
            "ks": np.zeros(count, np.int32),
            "ke": np.arange(first + 1, end + 1, dtype=np.int32),
            "q": self.q[rows],
            "kv": self.kv[:end],
        }

    @property
    def _first(self) -> int:
        return len(self.kv) - len(self.q)


def embed(tokens: np.ndarray, queries: int, preset: Preset, seed: int = 0) -> Prompt:
    """Make the inputs of a layer.

    Equal bytes after equal bytes have nearly equal vectors, and every query head looks for keys like that of its own
    token. So the selection follows the text.

    Parameters
    ----------
    tokens : ndarray [n], uint8
    queries : int
        The number of last tokens that become queries.
    preset : Preset
    seed : int

    Returns
    -------
    Prompt
    """
    rng = np.random.default_rng(seed)
    hidden = _hidden(rng, tokens)
    asking = hidden[-queries:]

    def project(x: np.ndarray, *shape: int) -> np.ndarray:
        matrix = rng.standard_normal((_WIDTH, int(np.prod(shape))), np.float32)
        matrix *= np.float32(_WIDTH**-0.5)
        return (x @ matrix).reshape(len(x), *shape)

    index_k = _normalized(project(hidden, preset.d_idx))
    kv = _normalized(project(hidden, preset.d_qk))
    index_q = _normalized(index_k[-queries:, None] + project(asking, preset.h_idx, preset.d_idx))
    weights = 1 + project(asking, preset.h_idx) / 2
    weights *= np.float32(preset.h_idx**-0.5 * preset.d_idx**-0.5)
    q = project(asking, preset.h_q, preset.d_qk)
    q += kv[-queries:, None] / 4
    q = _normalized(q) * np.float32(preset.q_spread)
    return Prompt(index_k, kv, index_q, weights, q)


def _hidden(rng: np.random.Generator, tokens: np.ndarray) -> np.ndarray:
    """Hidden states [n, _WIDTH]: a decaying sum over the vectors of a byte and those before it, plus its position."""
    n, half = len(tokens), _WIDTH // 2
    table = rng.standard_normal((256, _WIDTH), np.float32)
    angles = np.arange(n, dtype=np.float32)[:, None] * np.geomspace(1, 1e-4, half, dtype=np.float32)
    hidden = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * np.float32(_POSITION)
    for tap in range(min(_TAPS, n)):
        # Roll it, so that "ab" and "ba" differ.
        vectors = np.roll(table, tap, axis=1) * np.float32(_DECAY**tap)
        hidden[tap:] += vectors[tokens[: n - tap]]
    return _normalized(hidden)


def _normalized(x: np.ndarray) -> np.ndarray:
    """Scale the last axis to a mean square of 1, in place."""
    x *= 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))
    return x
