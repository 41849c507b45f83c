"""Checkpoints of DSA models as they are published, read tensor by tensor.

A checkpoint is a directory with ``config.json`` and one or more ``.safetensors`` files. Names are Transformers' and
those of the published models: experts one by one, or merged. Weights in fp8 come with a scale for each block of
128 x 128 (``weight_scale_inv``) and are multiplied out while they are read. Every tensor that the model has must be
there in its shape, and nothing else may be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors
import torch
import transformers

from ..errors import ArgumentError, ModelError
from .families import FAMILIES, Family

#: Element types that a model is loaded in, by name.
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

_FP8 = torch.float8_e4m3fn
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
    directory = Path(checkpoint)
    settings = read_config(directory)
    quantization = settings.pop("quantization_config", None)
    block = _block_size(quantization)
    config, first = _config(settings, layers)
    model = _empty(config, dtype)
    with ExitStack() as files:
        _fill(model, _Tensors(directory, files, block), first, _published_layers(settings, config))
    return model.eval()


class Checkpoint:
    """A published checkpoint whose parts are read one at a time, so that it may be larger than memory.

    Used as a context manager: the files are open until its end.

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
        block = _block_size(settings.pop("quantization_config", None))
        self.config, _ = _config(settings, None)
        self.family = family_of(self.config)
        self.dtype = dtype
        self._files = ExitStack()
        try:
            self._tensors = _Tensors(directory, self._files, block)
        except BaseException:
            self._files.close()
            raise

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._files.close()

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
        _read_weights(module, self._tensors, lambda name: prefix + name)
        unused = [n for n in self._tensors.names if n.startswith(prefix) and n not in self._tensors.used]
        _complain("not expected", [n for n in unused if not n.endswith(_COMPUTED)], "of the model")
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
    method = quantization.get("quant_method")
    size = quantization.get("weight_block_size")
    if method != "fp8" or not size or len(size) != 2:
        raise ModelError(
            "config.json: quantization_config: expected quant_method fp8 with weight_block_size, "
            f"got {method} with {size}"
        )
    return size[0], size[1]


def _config(settings: dict[str, Any], layers: tuple[int, int] | None) -> tuple[Any, int]:
    """The configuration of these layers, and which of the checkpoint's is the first."""
    family = next(f for f in FAMILIES if f.model_type == settings["model_type"])
    try:
        config = getattr(transformers, f"{family.prefix}Config").from_dict(settings)
    except Exception as error:  # Transformers validates in its own classes
        raise ModelError(f"config.json: expected a configuration of {family.model_type}, got: {error}") from error
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


def _published_layers(settings: dict[str, Any], config: Any) -> int:
    """How many layers of the checkpoint are the model's; behind them are those that predict further tokens."""
    return settings.get("num_hidden_layers", type(config)().num_hidden_layers)


def family_of(config: Any) -> Family:
    """The family of a configuration."""
    return next(f for f in FAMILIES if f.model_type == config.model_type)


def _empty(config: Any, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The model without memory for its weights."""
    made = getattr(transformers, f"{family_of(config).prefix}ForCausalLM")
    model = _without_memory(lambda: made(config), dtype)
    _keep_float32(model, model, dtype)
    # Its buffers are computed, not read.
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=config)
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
    if dtype == torch.float16:  # what Transformers means by the list without "strict"
        kept += rules._keep_in_fp32_modules or ()
    for name, parameter in module.named_parameters():
        if any(part in prefix + name for part in kept):
            parameter.data = parameter.data.float()


class _Tensors:
    """The tensors of all files of a checkpoint, by name."""

    def __init__(self, directory: Path, files: ExitStack, block: tuple[int, int] | None):
        self.block = block
        self._files: dict[str, Any] = {}
        for path in _paths(directory):
            try:
                opened = files.enter_context(safetensors.safe_open(path, framework="pt"))
            except FileNotFoundError:
                raise ModelError(f"{path}: expected a file that the index names, got none") from None
            except safetensors.SafetensorError as error:
                raise ModelError(f"{path}: expected a whole safetensors file, got: {error}") from None
            for name in opened.keys():  # noqa: SIM118  # no mapping
                if name in self._files:
                    raise ModelError(f"{path}: {name}: expected it in one file only, got it in two")
                self._files[name] = opened
        self.used: set[str] = set()

    @property
    def names(self) -> Iterable[str]:
        return self._files

    def has(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor in `dtype`; the scales of an fp8 one are multiplied in."""
        x = self._read(name, shape)
        if x.dtype == _FP8:
            scale = f"{name}_scale_inv"
            if self.block is None or len(shape) != 2 or not self.has(scale):
                raise ModelError(f"{name}: expected {scale} and a quantization_config beside fp8 weights, got none")
            rows, columns = self.block
            blocks = (-(-shape[0] // rows), -(-shape[1] // columns))
            factors = self._read(scale, blocks).float()
            factors = factors.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(columns, 1)[:, : shape[1]]
            x = x.float().mul_(factors)
        if not x.dtype.is_floating_point:
            raise ModelError(f"{name}: expected floating point numbers, got {x.dtype}")
        # A copy: what safetensors hands out lies in the mapped file.
        return x.to(dtype, copy=True)

    def _read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        found = tuple(self._files[name].get_slice(name).get_shape())
        if found != tuple(shape):
            raise ModelError(f"{name}: expected shape {list(shape)}, got {list(found)}")
        self.used.add(name)
        try:
            return self._files[name].get_tensor(name)
        except safetensors.SafetensorError as error:
            raise ModelError(f"{name}: expected a tensor that can be read, got: {error}") from None


def _paths(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.exists():
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: expected JSON with a weight_map, got: {error!r}") from None
        return [directory / name for name in sorted(files)]
    found = sorted(directory.glob("*.safetensors"))
    if not found:
        raise ModelError(f"{directory}: expected .safetensors files, got none")
    return found


def _fill(model: Any, tensors: _Tensors, first: int, published: int) -> None:
    """Give a model without weights those of a checkpoint; its layer 0 is the checkpoint's `first`."""
    tied = model.config.tie_word_embeddings and not tensors.has("lm_head.weight")
    _read_weights(model, tensors, lambda name: _shifted(name, first), left_out=["lm_head.weight"] if tied else [])
    last = first + model.config.num_hidden_layers
    _complain(
        "not expected",
        [n for n in tensors.names if n not in tensors.used and not _left_out(n, first, last, published)],
        "of the model",
    )
    model.tie_weights()
    empty = [name for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
    _complain("missing", empty, "in the files")


def _read_weights(
    module: torch.nn.Module, tensors: _Tensors, name_of: Callable[[str], str], left_out: Iterable[str] = ()
) -> None:
    """Give a module without weights those of a checkpoint, which calls them `name_of` their names here."""
    wanted = {name: x for name, x in module.state_dict().items() if name not in left_out}
    sources = {name: _sources(name_of(name), x, tensors) for name, x in wanted.items()}
    _complain(
        "missing", [part for parts in sources.values() for part, _ in parts if not tensors.has(part)], "in the files"
    )
    for name, parts in sources.items():
        like = wanted[name]
        if len(parts) == 1:
            value = tensors.read(parts[0][0], tuple(like.shape), like.dtype)
        else:
            value = torch.empty(like.shape, dtype=like.dtype)
            for part, place in parts:
                piece = place(value)
                piece.copy_(tensors.read(part, tuple(piece.shape), like.dtype))
        _assign(module, name, value)


def _shifted(name: str, first: int) -> str:
    return _LAYER.sub(lambda match: f"model.layers.{int(match[1]) + first}.", name)


def _sources(name: str, like: torch.Tensor, tensors: _Tensors) -> list[tuple[str, Callable]]:
    """What a tensor of the model is read from, each with the part of it that it fills."""
    match = _EXPERTS.match(name)
    if match is None or tensors.has(name):
        return [(name, lambda x: x)]
    parts: list[tuple[str, Callable]] = []
    half = like.shape[1] // 2
    for i in range(like.shape[0]):
        if match[2] == "down_proj":
            parts.append((f"{match[1]}.{i}.down_proj.weight", lambda x, i=i: x[i]))
        else:
            parts.append((f"{match[1]}.{i}.gate_proj.weight", lambda x, i=i: x[i, :half]))
            parts.append((f"{match[1]}.{i}.up_proj.weight", lambda x, i=i: x[i, half:]))
    return parts


def _left_out(name: str, first: int, last: int, published: int) -> bool:
    """Whether a tensor of the checkpoint is one that the loaded part of the model does without."""
    match = _LAYER.match(name)
    if match is None:
        return False
    layer = int(match[1])
    # Behind the model's own layers are those that predict further tokens.
    return not first <= layer < last or layer >= published or name.endswith(_COMPUTED)


def _assign(model: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value


def _complain(what: str, names: list[str], where: str) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise ModelError(f"checkpoint: tensors {what} {where}: {', '.join(names[:_NAMED])}{more}")
