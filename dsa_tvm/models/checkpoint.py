"""Checkpoints of DSA models as they are published, read tensor by tensor.

A checkpoint is a directory with ``config.json`` and one or more ``.safetensors`` files. Names are Transformers' and
those of the published models: experts one by one, or merged. Weights in fp8 come with a scale for each block of
128 x 128 (``weight_scale_inv``) and are multiplied out while they are read. Every tensor that the model has must be
there in its shape, and nothing else may be; all of that is known before the first weight is read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import safetensors
import torch
import transformers

from ..errors import ArgumentError, ModelError
from .families import FAMILIES, Family, family_of

#: Element types that a model is loaded in, by name.
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: Element types of weights, as safetensors calls them.
_FP8 = "F8_E4M3"
_FLOATS = ("F64", "F32", "F16", "BF16", _FP8)
#: What a piece of a tensor may take in float32.
_PIECE_BYTES = 32 << 20
#: How much of a file is read through one mapping: what was read counts as the process's memory until it is unmapped.
_MAPPED_BYTES = 64 << 20
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_EXPERTS = re.compile(r"^(.*\.experts)\.(gate_up_proj|down_proj)$")
#: In old checkpoints, and computed.
_COMPUTED = ".rotary_emb.inv_freq"
#: Names in a message; a model has thousands.
_NAMED = 5


def load_model(
    checkpoint: str | Path, *, dtype: torch.dtype = torch.float32, layers: tuple[int, int] | None = None
) -> transformers.PreTrainedModel:
    """Load a published checkpoint onto the CPU.

    Parameters
    ----------
    checkpoint : str or Path
        The directory.
    dtype : torch.dtype
        What weights are converted to, fp8 ones too. What Transformers keeps in float32 stays there.
    layers : tuple of two int, optional
        First layer and one past the last, counted from 0. The others are left out, so that a part of a model that does
        not fit can be tried: embedding, these layers, final norm and head.

    Returns
    -------
    model : transformers.PreTrainedModel
        `DeepseekV32ForCausalLM` or `GlmMoeDsaForCausalLM` in evaluation mode, with Transformers' default attention.
        It takes the memory of its weights in `dtype`, and while it is loaded that of one tensor more.

    Raises
    ------
    ArgumentError
        Layers that the model does not have.
    ModelError
        No checkpoint, a model of another type, an unknown quantization, or tensors that are missing, too many,
        truncated, or of another shape; the message names them.
    """
    unread = UnreadModel(checkpoint, dtype=dtype, layers=layers)
    for name, like in unread.weights.items():
        unread.assign(name, _joined(unread.pieces(name), like))
    return unread.finished()


class UnreadModel:
    """The model that a checkpoint is to become, before any weight is read.

    Parameters
    ----------
    checkpoint : str or Path
    dtype : torch.dtype
    layers : tuple of two int, optional
        As of `load_model`, and with its exceptions.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        Without memory for its weights, until they are assigned.
    weights : dict of str to tensor
        Shape and element type of each weight of the model, on the device "meta".
    """

    def __init__(
        self, checkpoint: str | Path, *, dtype: torch.dtype = torch.float32, layers: tuple[int, int] | None = None
    ):
        directory = Path(checkpoint)
        settings = read_config(directory)
        block = _block_size(settings.pop("quantization_config", None))
        config, first = _config(settings, layers)
        self.model = _empty(config, dtype)
        self._tensors = _Tensors(directory, block)
        self.weights = dict(self.model.state_dict())
        if config.tie_word_embeddings and not self._tensors.has("lm_head.weight"):
            del self.weights["lm_head.weight"]
        self._sources, used = _checked_sources(self.weights, lambda name: _shifted(name, first), self._tensors)
        last, published = first + config.num_hidden_layers, _published_layers(settings, config)
        extra = [n for n in self._tensors.names if n not in used and not _left_out(n, first, last, published)]
        _complain("not expected", extra, "of the model")

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A weight of the model in pieces of a few MiB, one behind the other, in its element type."""
        for part, shape in self._sources[name]:
            yield from self._tensors.read(part, shape, self.weights[name].dtype)

    def assign(self, name: str, value: torch.Tensor) -> None:
        """Give the model a weight."""
        _assign(self.model, name, value)

    def finished(self) -> transformers.PreTrainedModel:
        """The model, after every weight was assigned, in evaluation mode."""
        self.model.tie_weights()
        empty = [name for name, x in (*self.model.named_parameters(), *self.model.named_buffers()) if x.is_meta]
        _complain("missing", empty, "in the files")
        return self.model.eval()


class Checkpoint:
    """A published checkpoint whose parts are read one at a time, so that it may be larger than memory.

    Used as a context manager: files are closed at its end.

    Parameters
    ----------
    directory : str or Path
    dtype : torch.dtype
        What weights are converted to, fp8 ones too. What Transformers keeps in float32 stays there.

    Attributes
    ----------
    config : transformers.PreTrainedConfig
    family : Family

    Raises
    ------
    ModelError
        As `load_model`.
    """

    def __init__(self, directory: str | Path, *, dtype: torch.dtype = torch.float32):
        directory = Path(directory)
        settings = read_config(directory)
        block = _block_size(settings.get("quantization_config"))
        self.config = config_of(settings)
        self.family = family_of(self.config.model_type)
        self.dtype = dtype
        self._tensors = _Tensors(directory, block)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._tensors.close()

    def read(self, make: Callable[[], Any], prefix: str) -> Any:
        """A module with its weights from the checkpoint.

        Parameters
        ----------
        make : callable
            Makes the module; none of its tensors takes memory while it does.
        prefix : str
            What the names of its tensors begin with in the checkpoint, such as ``model.layers.3.self_attn.``.

        Returns
        -------
        module : torch.nn.Module
            In evaluation mode.

        Raises
        ------
        ModelError
            A tensor with this prefix is missing, too many, truncated, or of another shape; the message names it.
        """
        module = _without_memory(make, self.dtype)
        classes = getattr(self.family.module, f"{self.family.prefix}PreTrainedModel")
        _keep_float32(module, classes, self.dtype, prefix)
        weights = module.state_dict()
        sources, used = _checked_sources(weights, lambda name: prefix + name, self._tensors)
        unused = [n for n in self._tensors.names if n.startswith(prefix) and n not in used]
        _complain("not expected", [n for n in unused if not n.endswith(_COMPUTED)], "of the model")
        for name, like in weights.items():
            pieces = (x for part, shape in sources[name] for x in self._tensors.read(part, shape, like.dtype))
            _assign(module, name, _joined(pieces, like))
        return module.eval()


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint of a model type that is served; `ModelError` says what is wrong with it."""
    path = directory / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{directory}: expected a directory with config.json, got none") from None
    except NotADirectoryError:
        raise ModelError(f"{directory}: expected a directory with config.json, got a file") from None
    except ValueError as error:
        raise ModelError(f"{path}: expected JSON, got: {error}") from None
    served = " or ".join(family.model_type for family in FAMILIES)
    found = settings.get("model_type") if isinstance(settings, dict) else None
    if found not in [family.model_type for family in FAMILIES]:
        raise ModelError(f"{path}: model_type: expected {served}, got {found}")
    return settings


def _block_size(quantization: Any) -> tuple[int, int] | None:
    if quantization is None:
        return None
    settings = quantization if isinstance(quantization, dict) else {}
    method, size = settings.get("quant_method"), settings.get("weight_block_size")
    whole = isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)
    if method != "fp8" or size is None or not whole:
        raise ModelError(
            "config.json: quantization_config: expected quant_method fp8 with weight_block_size of two numbers, "
            f"got {method} with {size}"
        )
    return size[0], size[1]


def config_of(settings: dict[str, Any]) -> Any:
    """The configuration of a whole model by `read_config`, without that of its quantization; errors as `load_model`."""
    return _config({name: x for name, x in settings.items() if name != "quantization_config"}, None)[0]


def _config(settings: dict[str, Any], layers: tuple[int, int] | None) -> tuple[Any, int]:
    """The configuration of these layers, and which of the checkpoint's is the first."""
    family = family_of(settings["model_type"])
    try:
        config = getattr(transformers, f"{family.prefix}Config").from_dict(settings)
    except Exception as error:  # Transformers validates in its own classes
        raise _no_configuration(family, str(error)) from error
    _check_config(config)
    if layers is None:
        return config, 0
    first, last = layers
    if not 0 <= first < last <= config.num_hidden_layers:
        raise ArgumentError(f"layers: expected a range within 0:{config.num_hidden_layers}, got {first}:{last}")
    for name in ("mlp_layer_types", "layer_types", "indexer_types"):
        if (kinds := getattr(config, name, None)) is not None:
            setattr(config, name, list(kinds)[first:last])
    if getattr(config, "indexer_types", ["full"])[0] != "full":
        raise ArgumentError(
            f"layers: expected a first layer with an indexer, got {first}, which shares the selection of one before"
        )
    config.num_hidden_layers = last - first
    return config, first


def _no_configuration(family: Family, what: str) -> ModelError:
    return ModelError(f"config.json: expected a configuration of {family.model_type}, got: {' '.join(what.split())}")


def _check_config(config: Any) -> None:
    """Raise `ModelError` for what Transformers would find out in the middle of a forward."""
    kinds = getattr(config, "indexer_types", None)
    if kinds is not None:
        right = len(kinds) == config.num_hidden_layers and set(kinds) <= {"full", "shared"} and kinds[0] == "full"
        if not right:
            expected = f"{config.num_hidden_layers} times full or shared, the first one full"
            raise ModelError(f"config.json: indexer_types: expected {expected}, got {', '.join(map(str, kinds))}")
    experts, groups = config.n_routed_experts, config.n_group
    if groups < 1 or experts % groups:
        raise ModelError(f"config.json: n_group: expected a divisor of {experts} n_routed_experts, got {groups}")
    if not 1 <= config.topk_group <= groups:
        raise ModelError(f"config.json: topk_group: expected 1..{groups}, got {config.topk_group}")
    most = config.topk_group * experts // groups
    if not 1 <= config.num_experts_per_tok <= most:
        raise ModelError(f"config.json: num_experts_per_tok: expected 1..{most}, got {config.num_experts_per_tok}")


def _published_layers(settings: dict[str, Any], config: Any) -> int:
    """How many layers of the checkpoint are the model's; behind them are those that predict further tokens."""
    return settings.get("num_hidden_layers", type(config)().num_hidden_layers)


def _empty(config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model without memory for its weights."""
    family = family_of(config.model_type)
    made = getattr(transformers, f"{family.prefix}ForCausalLM")
    try:
        model = _without_memory(lambda: made(config), dtype)
        # Its buffers are computed, not read.
        model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    except Exception as error:  # a name that Transformers does not know, for example
        raise _no_configuration(family, f"{type(error).__name__}: {error}") from error
    _keep_float32(model, model, dtype)
    return model


def _without_memory(make: Callable[[], Any], dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return make()
    finally:
        torch.set_default_dtype(before)


def _keep_float32(module: torch.nn.Module, rules: Any, dtype: torch.dtype, prefix: str = "") -> None:
    """Make those parameters float32 that Transformers keeps so, by the rules of a model or its class."""
    kept = [*(rules._keep_in_fp32_modules_strict or ())]
    if dtype == torch.float16:  # Transformers applies the list without "strict" to float16 only
        kept += rules._keep_in_fp32_modules or ()
    for name, parameter in module.named_parameters():
        if any(part in prefix + name for part in kept):
            parameter.data = parameter.data.float()


class _Entry(NamedTuple):
    """Where a tensor is, and what its file says of it."""

    path: Path
    shape: tuple[int, ...]
    dtype: str


class _Tensors:
    """The tensors of all files of a checkpoint, by name."""

    def __init__(self, directory: Path, block: tuple[int, int] | None):
        self.block = block
        self._entries: dict[str, _Entry] = {}
        self._open: Any = None
        self._open_path: Path | None = None
        self._mapped = 0
        for path in _paths(directory):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    if name in self._entries:
                        raise ModelError(f"{path}: {name}: expected it in one file only, got it in two")
                    x = file.get_slice(name)
                    self._entries[name] = _Entry(path, tuple(x.get_shape()), x.get_dtype())

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def has(self, name: str) -> bool:
        return name in self._entries

    def close(self) -> None:
        self._open = self._open_path = None

    def check(self, name: str, shape: tuple[int, ...]) -> list[str]:
        """Names of what has to be read for a tensor of this shape; `ModelError` unless that can be read."""
        entry = self._entries[name]
        if entry.shape != shape:
            raise ModelError(f"{name}: expected shape {list(shape)}, got {list(entry.shape)}")
        if entry.dtype not in _FLOATS:
            raise ModelError(f"{name}: expected one of {', '.join(_FLOATS)}, got {entry.dtype}")
        if entry.dtype != _FP8:
            return [name]
        scale = f"{name}_scale_inv"
        if self.block is None or len(shape) != 2 or not self.has(scale):
            raise ModelError(f"{name}: expected {scale} and a quantization_config beside fp8 weights, got none")
        if self._entries[scale].dtype == _FP8:
            raise ModelError(f"{scale}: expected one of {', '.join(_FLOATS[:-1])}, got {_FP8}")
        blocks = (-(-shape[0] // self.block[0]), -(-shape[1] // self.block[1]))
        return [name, *self.check(scale, blocks)]

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """A tensor in `dtype`, some rows at a time; the scales of an fp8 one are multiplied in."""
        if len(shape) < 2:
            yield self._rows(name, slice(None)).to(dtype)
            return
        step = max(1, _PIECE_BYTES // (4 * math.prod(shape[1:])))
        if self._entries[name].dtype != _FP8 or self.block is None:
            for first in range(0, shape[0], step):
                yield self._rows(name, slice(first, first + step)).to(dtype)
            return
        rows, columns = self.block
        step = rows * max(1, step // rows)
        factors = self._rows(f"{name}_scale_inv", slice(None)).float()
        for first in range(0, shape[0], step):
            x = self._rows(name, slice(first, first + step)).float()
            own = factors[first // rows : (first + step) // rows]
            own = own.repeat_interleave(rows, 0)[: len(x)].repeat_interleave(columns, 1)[:, : shape[1]]
            yield x.mul_(own).to(dtype)

    def _rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of a tensor, in memory of their own."""
        path = self._entries[name].path
        if path != self._open_path or self._mapped > _MAPPED_BYTES:
            self._open, self._open_path, self._mapped = _opened(path), path, 0
        try:
            x = self._open.get_slice(name)
            x = x[rows] if self._entries[name].shape else self._open.get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ModelError(f"{name}: expected a tensor that can be read, got: {error}") from None
        self._mapped += x.nbytes
        return x.clone()


def _opened(path: Path) -> Any:
    try:
        return safetensors.safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelError(f"{path}: expected a file that the index names, got none") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{path}: expected a whole safetensors file, got: {error}") from None


def _paths(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: expected JSON with a weight_map, got: {error!r}") from None
        for name in files:  # a file outside of the directory is refused
            if not isinstance(name, str) or name in ("", ".", "..") or name != os.path.basename(name):
                raise ModelError(f"{index}: expected names of files beside it, got {name!r}")
        return [directory / name for name in sorted(files)]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{directory}: expected .safetensors files, got none")
    return found


def _checked_sources(
    weights: Mapping[str, torch.Tensor], name_of: Callable[[str], str], tensors: _Tensors
) -> tuple[dict[str, list[tuple[str, tuple[int, ...]]]], set[str]]:
    """What each weight is read from, in a checkpoint that calls it `name_of` its name, and all names that are read."""
    sources = {name: _sources(name_of(name), x, tensors) for name, x in weights.items()}
    parts = [part for own in sources.values() for part in own]
    _complain("missing", [name for name, _ in parts if not tensors.has(name)], "in the files")
    return sources, {read for part in parts for read in tensors.check(*part)}


def _joined(pieces: Iterator[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    value = torch.empty(like.shape, dtype=like.dtype)
    flat, done = value.view(-1), 0
    for piece in pieces:
        flat[done : done + piece.numel()] = piece.flatten()
        done += piece.numel()
    return value


def _shifted(name: str, first: int) -> str:
    return _LAYER.sub(lambda match: f"model.layers.{int(match[1]) + first}.", name)


def _sources(name: str, like: torch.Tensor, tensors: _Tensors) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a tensor of the model is read from, in the order in which it lies in memory."""
    match, shape = _EXPERTS.match(name), tuple(like.shape)
    if match is None or tensors.has(name):
        return [(name, shape)]
    experts = range(shape[0])
    if match[2] == "down_proj":
        return [(f"{match[1]}.{i}.down_proj.weight", shape[1:]) for i in experts]
    half = (shape[1] // 2, *shape[2:])
    return [(f"{match[1]}.{i}.{part}.weight", half) for i in experts for part in ("gate_proj", "up_proj")]


def _left_out(name: str, first: int, last: int, published: int) -> bool:
    """Whether a tensor of the checkpoint is one that the loaded part of the model does without."""
    match = _LAYER.match(name)
    if match is None:
        return False
    layer = int(match[1])
    # The layers after the model's own ones predict further tokens.
    return not first <= layer < last or layer >= published or name.endswith(_COMPUTED)


def _assign(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _complain(what: str, names: list[str], where: str) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise ModelError(f"checkpoint: tensors {what} {where}: {', '.join(names[:_NAMED])}{more}")
