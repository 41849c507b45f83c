"""Tokens from an exported model, by ONNX Runtime. Needs neither torch nor Transformers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...errors import ArgumentError, ModelError
from ...runtime.library import get_library_path

_MODEL = "model.onnx"
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
#: NumPy has no such type. The number is ONNX's.
_BFLOAT16, _BFLOAT16_NUMBER = "tensor(bfloat16)", 16
_CACHE = "past_key_values."


@dataclass
class Timing:
    """What a generation took.

    Parameters
    ----------
    prefill_tokens, decode_tokens : int
        Of all sequences together, without padding. The first new token of each counts as part of the prefill.
    prefill_seconds, decode_seconds : float
        In ONNX Runtime and in choosing tokens; what the caller does between two tokens does not count.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def __str__(self) -> str:
        parts = []
        for what, tokens, seconds in (
            ("prefill", self.prefill_tokens, self.prefill_seconds),
            ("decode", self.decode_tokens, self.decode_seconds),
        ):
            if tokens:
                parts.append(f"{what} {tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} a second)")
        return ", ".join(parts)


class Generator:
    """Greedy generation with a model that `export_model` or `export_checkpoint` has made.

    Caches have a fixed capacity and are bound to inputs and outputs of the model: a step writes its rows and copies
    nothing.

    Parameters
    ----------
    directory : str or Path
        With ``model.onnx`` and ``config.json``.
    library : bool or str or Path
        True: the library of this package runs the nodes of ``ai.dsa``; a path: that library does. False: their bodies
        of standard operators do, which is slower.
    threads : int
        Of ONNX Runtime and the library; 0 for all.

    Raises
    ------
    ArgumentError
        A negative number of threads.
    ModelError
        No model there, or one that ONNX Runtime cannot load, or one with other inputs.

    Attributes
    ----------
    timing : Timing
        Of the last generation; it grows while one is under way.
    """

    def __init__(self, directory: str | Path, *, library: bool | str | Path = True, threads: int = 0):
        if threads < 0:
            raise ArgumentError(f"threads: expected 0 for all, or a number of them, got {threads}")
        self.directory = Path(directory)
        self.config = _read_json(self.directory / "config.json")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if library is not False:
            kernels = get_library_path() if library is True else get_library_path(library)
            options.register_custom_ops_library(kernels)
        path = self.directory / _MODEL
        if not path.is_file():
            raise ModelError(f"{self.directory}: expected a directory with {_MODEL}, got none")
        try:
            self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no base of their own
            raise ModelError(f"{path}: expected a model that ONNX Runtime can load, got: {error}") from error
        inputs = {value.name: value for value in self.session.get_inputs()}
        self._caches = {n: x for n, x in inputs.items() if n.startswith(f"input.{_CACHE}")}
        if not self._caches or set(inputs) - set(self._caches) != {"input_ids", "position_ids", "logits_to_keep"}:
            raise ModelError(f"{path}: expected a model that dsa-tvm export has made, got inputs {', '.join(inputs)}")
        self.timing = Timing()

    @property
    def max_length(self) -> int:
        """Positions that the model was made for."""
        return self._number("max_position_embeddings")

    def _number(self, name: str) -> int:
        value = self.config.get(name)
        if type(value) is not int or value < 1:
            raise ModelError(f"{self.directory / 'config.json'}: {name}: expected a positive integer, got {value}")
        return value

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a sequence, by ``generation_config.json`` or else ``config.json``."""
        path = self.directory / "generation_config.json"
        settings = _read_json(path) if path.exists() else {}
        found = settings.get("eos_token_id", self.config.get("eos_token_id"))
        ids = [] if found is None else found if isinstance(found, list) else [found]
        if not all(type(token) is int for token in ids):
            raise ModelError(f"{self.directory}: eos_token_id: expected an integer or several, got {found}")
        return frozenset(ids)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """New tokens of each prompt, the one that ends it included. The arguments are those of `stream`."""
        made: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **options):
            for tokens, token in zip(made, step, strict=True):
                if token is not None:
                    tokens.append(token)
        return made

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        *,
        capacity: int | None = None,
        chunk: int = 512,
        eos_token_ids: frozenset[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[list[int | None]]:
        """Generate greedily, step by step.

        Parameters
        ----------
        prompts : sequence of sequences of int
            Token ids; their lengths may differ.
        max_new_tokens : int
            Where to stop at the latest.
        capacity : int, optional
            Positions that the caches have room for; by default the longest prompt and its new tokens.
        chunk : int
            Tokens of a prompt that go through the model at a time: more take more memory.
        eos_token_ids : frozenset of int, optional
            What ends a sequence; by default the model's.
        progress : callable, optional
            Called during prefill with the number of positions done and of all.

        Yields
        ------
        tokens : list of int or None
            The next token of each sequence, None for one that has ended.

        Raises
        ------
        ArgumentError
            No prompt, an empty one, a token that is not in the vocabulary, or more positions than the capacity or the
            model has.
        """
        self._check(prompts, max_new_tokens, capacity, chunk)
        ends = self.eos_token_ids if eos_token_ids is None else eos_token_ids
        longest = max(len(prompt) for prompt in prompts)
        return self._steps(prompts, max_new_tokens, capacity or longest + max_new_tokens, chunk, ends, progress)

    def _check(self, prompts: Sequence[Sequence[int]], new: int, capacity: int | None, chunk: int) -> None:
        if not prompts:
            raise ArgumentError("prompts: expected one at least, got none")
        if new < 1:
            raise ArgumentError(f"max_new_tokens: expected 1 at least, got {new}")
        if chunk < 1:
            raise ArgumentError(f"chunk: expected 1 at least, got {chunk}")
        vocabulary = self._number("vocab_size")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ArgumentError(f"prompts: {i}: expected a token at least, got none")
            if not 0 <= min(prompt) <= max(prompt) < vocabulary:
                raise ArgumentError(
                    f"prompts: {i}: expected tokens in 0..{vocabulary - 1}, got {min(prompt)} to {max(prompt)}"
                )
        needed = max(len(prompt) for prompt in prompts) + new
        for name, most in (("max_position_embeddings", self.max_length), ("capacity", capacity)):
            if most is not None and needed > most:
                raise ArgumentError(f"prompt and max_new_tokens: expected at most {most} ({name}), got {needed}")

    def _steps(
        self,
        prompts: Sequence[Sequence[int]],
        new: int,
        capacity: int,
        chunk: int,
        ends: frozenset[int],
        progress: Callable[[int, int], None] | None,
    ) -> Iterator[list[int | None]]:
        batch, longest = len(prompts), max(len(prompt) for prompt in prompts)
        self.timing = timing = Timing(prefill_tokens=sum(len(prompt) for prompt in prompts))
        ids = np.zeros((batch, longest), np.int64)
        positions = np.full((batch, longest), -1, np.int64)
        for i, prompt in enumerate(prompts):  # on the left, so that all end together
            ids[i, longest - len(prompt) :] = prompt
            positions[i, longest - len(prompt) :] = np.arange(len(prompt))
        caches = {name: _zeros(x.type, (batch, capacity, x.shape[2])) for name, x in self._caches.items()}
        for first in range(0, longest, chunk):
            started = time.perf_counter()
            part = slice(first, min(first + chunk, longest))
            last = [part.stop - part.start - 1] if part.stop == longest else []
            logits = self._run(ids[:, part], positions[:, part], np.array(last, np.int64), caches)
            timing.prefill_seconds += time.perf_counter() - started
            if progress is not None:
                progress(part.stop, longest)
        chosen = logits[:, -1].argmax(-1)
        position = positions[:, -1:].copy()
        alive = np.ones(batch, bool)
        for step in range(new):
            if step:
                started = time.perf_counter()
                position[alive] += 1
                # A sequence that has ended takes no more rows.
                at = np.where(alive[:, None], position, -1)
                chosen = self._run(chosen[:, None], at, np.zeros(1, np.int64), caches)[:, -1].argmax(-1)
                timing.decode_tokens += int(alive.sum())
                timing.decode_seconds += time.perf_counter() - started
            yield [int(token) if living else None for token, living in zip(chosen, alive, strict=True)]
            alive &= ~np.isin(chosen, list(ends))
            if not alive.any():
                return

    def _run(self, ids: np.ndarray, positions: np.ndarray, keep: np.ndarray, caches: dict[str, Any]) -> np.ndarray:
        binding = self.session.io_binding()
        for name, x in (("input_ids", ids), ("position_ids", positions), ("logits_to_keep", keep)):
            binding.bind_cpu_input(name, np.ascontiguousarray(x))
        binding.bind_output("logits")
        for name, value in caches.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("input.", "output.", 1), value)
        self.session.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()


def _zeros(kind: str, shape: tuple[int, ...]) -> Any:
    if kind == _BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.zeros(shape, np.uint16), _BFLOAT16_NUMBER)
    return ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, _TYPES[kind]))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ModelError(f"{path}: expected the file of an exported model, got none") from None
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found
