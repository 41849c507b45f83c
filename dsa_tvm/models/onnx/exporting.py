"""From a model of Transformers to an ONNX model with nodes of ``ai.dsa``, for prefill and decode."""

from __future__ import annotations

import contextlib
import errno
import glob
import logging
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from ... import export
from ...errors import ArgumentError, DsaError, ModelError
from ...runtime.files import owned, sync_directory
from ..checkpoint import DTYPES, UnreadModel
from ..families import NAME, cache_name
from ..transformers import accelerate, restore
from . import experts
from .weight_file import WeightFile

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
#: What lies beside the weights in a checkpoint, and a program that generates tokens wants to have.
_COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Room for the graph and its bodies, beside the weights.
_GRAPH_BYTES = 32 << 20
#: Smaller tensors are part of the graph, where shape inference sees them.
_EXTERNAL_BYTES = 1024
_DTYPES = (torch.float32, torch.float16)


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    layers: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    cache_dtype: torch.dtype | None = None,
    bodies: bool = True,
) -> None:
    """Export a published checkpoint, see `export_model` and `dsa_tvm.models.checkpoint.load_model`.

    The weights go from file to file, some rows of a tensor at a time, so the memory needed does not grow with them. It
    is about 0.6 GiB, 20 MiB for each layer, which its graph takes, and the largest matrix.

    Parameters
    ----------
    checkpoint : str or Path
        Directory with ``config.json`` and ``.safetensors``.
    directory : str or Path
        What is made.
    layers : tuple of two int, optional
        First layer and one past the last.
    dtype : torch.dtype
        float32 or float16.
    cache_dtype : torch.dtype, optional
    bodies : bool

    Raises
    ------
    ArgumentError, ModelError, OSError
        Nothing is at `directory` then that was not there before.
    """
    _check_dtype(dtype, cache_dtype)
    with _made_whole(Path(directory)) as made:
        opened = UnreadModel(checkpoint, dtype=dtype, layers=layers)
        accelerate(opened.model)  # says which sizes are not served, before anything is written
        _expect_room(opened.weights.values(), made)
        with _weight_file(made) as file:
            places = {name: file.add(x.numpy() for x in opened.pieces(name)) for name in opened.weights}
            for name, like in opened.weights.items():
                opened.assign(name, file.mapped(places[name], like))
            _write(opened.finished(), made, file, cache_dtype or dtype, bodies)
        for name in _COMPANIONS:
            if (source := Path(checkpoint) / name).is_file():
                shutil.copyfile(source, made / name)


def export_model(
    model: torch.nn.Module, directory: str | Path, *, cache_dtype: torch.dtype | None = None, bodies: bool = True
) -> None:
    """Export a loaded model to ``model.onnx`` and ``model.onnx.data``, with its configuration beside them.

    Parameters
    ----------
    model : DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM
        In float32 or float16, on the CPU. It is left as it was.
    directory : str or Path
        Made as a whole, at the end. It must not exist, or be empty.
    cache_dtype : torch.dtype, optional
        Of the caches, and so of the indexer and the attention: float32, float16 or bfloat16. By default the model's.
        Caches of 16 bits take half the memory of those of 32, and round what they hold.
    bodies : bool
        Whether nodes of ``ai.dsa`` get bodies of standard operators, so that the model runs without the library, too.

    Raises
    ------
    ArgumentError
        Another element type, or a `directory` that holds something.
    ModelError
        No model of these families, or a version of Transformers that cannot be exported.
    OSError
        A full disk, for example. Nothing is at `directory` then.
    """
    dtype = next(model.parameters()).dtype
    _check_dtype(dtype, cache_dtype)
    with _made_whole(Path(directory)) as made:
        _expect_room(model.parameters(), made)
        with _weight_file(made) as file:
            _write(model, made, file, cache_dtype or dtype, bodies)


def _check_dtype(dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    if cache_dtype not in (None, *DTYPES.values()):
        raise ArgumentError(f"export: cache_dtype: expected {', '.join(DTYPES)} or none, got {cache_dtype}")
    if dtype not in _DTYPES:
        raise ArgumentError(
            f"export: dtype: expected float32 or float16, got {str(dtype).removeprefix('torch.')}: ONNX Runtime's CPU "
            "provider has no bfloat16 kernels for the projections, norms and experts; caches may be bfloat16"
        )


@contextlib.contextmanager
def _made_whole(directory: Path) -> Iterator[Path]:
    """A directory beside `directory` to write into; it becomes `directory` at the end, or vanishes."""
    directory = Path(os.path.abspath(directory))
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ArgumentError(f"{directory}: expected a directory that is not there yet, got a file")
    if directory.exists() and any(directory.iterdir()):
        raise ArgumentError(f"{directory}: expected a directory that is not there yet or is empty, got one with files")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(directory)
    made = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.partial"
    made.mkdir()
    try:
        with _locked(made):
            yield made
            for path in made.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sync_directory(made)
            made.rename(directory)
        sync_directory(directory.parent)
    except BaseException as error:
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None and _within(error.filename, made):
            raise OSError(error.errno, error.strerror, str(directory)) from error
        raise


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    with contextlib.ExitStack() as held:
        # Where a file system has no locks, what a killed export leaves stays.
        with contextlib.suppress(OSError):
            held.enter_context(owned(directory))
        yield


def _within(name: Any, directory: Path) -> bool:
    """Whether an error is about a file of `directory`; writing to one that is open names none."""
    return name is None or Path(os.fsdecode(name)).is_relative_to(directory)


def _remove_abandoned(directory: Path) -> None:
    """Remove what exports to `directory` that were killed left beside it; a living one holds a lock on its own."""
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.{'[0-9a-f]' * 8}.partial"):
        with contextlib.suppress(OSError), owned(path):
            shutil.rmtree(path, ignore_errors=True)


def _expect_room(weights: Iterable[torch.Tensor], directory: Path) -> None:
    """Find out before minutes of work, and not after, that the disk is full."""
    needed = sum(x.numel() * x.element_size() for x in weights)
    if shutil.disk_usage(directory).free < needed + _GRAPH_BYTES:
        what = f"{os.strerror(errno.ENOSPC)} for {needed / 2**30:.1f} GiB of weights"
        raise OSError(errno.ENOSPC, what, str(directory.parent))


@contextlib.contextmanager
def _weight_file(directory: Path) -> Iterator[WeightFile]:
    file = WeightFile(directory / WEIGHTS)
    try:
        yield file
    finally:
        file.close()


def _write(model: Any, directory: Path, file: WeightFile, cache_dtype: torch.dtype, bodies: bool) -> None:
    program = _program(model, cache_dtype)
    tensors = {name: value.const_value for name, value in program.model.graph.initializers.items()}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.nbytes >= _EXTERNAL_BYTES}
    for name, (offset, length) in file.store({name: tensor.numpy() for name, tensor in tensors.items()}).items():
        program.model.graph.initializers[name].const_value = onnx_ir.ExternalTensor(
            WEIGHTS, offset, length, tensors[name].dtype, shape=tensors[name].shape, name=name, base_dir=str(directory)
        )
    graph = onnx_ir.to_proto(program.model)
    experts.as_scans(graph)
    _name_lengths(graph)
    _forget_sources(graph)
    _expect_one_capacity(graph)
    if bodies:
        export.attach_bodies(graph)
    (directory / MODEL).write_bytes(graph.SerializeToString())
    model.config.save_pretrained(directory)


def _forget_sources(model: onnx.ModelProto) -> None:
    """Drop the stack trace of every node: most of the graph's bytes, with paths of the machine that exported it.

    What stays is the module that a node belongs to, by which viewers fold the graph.
    """
    graphs = [model.graph, *model.functions]
    while graphs:
        for node in graphs.pop().node:
            kept = [entry for entry in node.metadata_props if entry.key == "namespace"]
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
            graphs += [x.g for x in node.attribute if x.type == onnx.AttributeProto.GRAPH]


class _GraphLayer(DynamicIndexedLayer):
    """Caches of fixed capacity that are inputs of the graph, and then its outputs."""

    def __init__(self, rows: torch.Tensor, indexer_keys: torch.Tensor | None, positions: torch.Tensor):
        super().__init__()
        self.rows, self.positions = rows, positions
        self.index_rows: Any = indexer_keys
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Latents and rope keys into the rows, all of which are handed out."""
        rows = torch.cat([key_states, value_states], -1)[:, 0].to(self.rows.dtype)
        self.rows = torch.ops.dsa_tvm.write_rows(self.rows, rows, self.positions)
        return self.rows[:, None], key_states.new_empty(key_states.shape[0], 1, 1, 0)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Indexer keys into theirs."""
        rows = indexer_key_states.to(self.index_rows.dtype)
        self.index_rows = torch.ops.dsa_tvm.write_rows(self.index_rows, rows, self.positions)
        return self.index_rows


class _Step(torch.nn.Module):
    """The model as a function of tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config = model.config
        self.full = [kind == "full" for kind in getattr(config, "indexer_types", None) or []]
        self.full = self.full or [True] * config.num_hidden_layers
        self.cache_name = cache_name(type(model).forward)

    def cache_names(self) -> list[str]:
        """Of the caches, in the order in which they come and go."""
        names = []
        for i, full in enumerate(self.full):
            names += [f"past_key_values.layers.{i}.keys"]
            names += [f"past_key_values.layers.{i}.indexer_keys"] if full else []
        return names

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        logits_to_keep: torch.Tensor,
        caches: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        positions = position_ids.to(torch.int32)
        # The end is looked up, because ONNX Runtime refuses to look up a position behind the capacity. Nothing else
        # would refuse it: the row would not be written, and a row of the next sequence would be read.
        ends = torch.arange(caches[0].shape[1] + 1, dtype=torch.int32)
        end = ends.index_select(0, (position_ids + 1).clamp(min=0).flatten()).view(position_ids.shape)
        ranges = torch.stack([torch.zeros_like(end), end], -1).unsqueeze(1)
        cache = DynamicCache(config=self.model.config)
        given = iter(caches)
        layers = [_GraphLayer(next(given), next(given) if full else None, positions) for full in self.full]
        cache.layers[:] = layers
        out = self.model(
            input_ids,
            attention_mask=ranges,
            position_ids=position_ids.clamp(min=0),
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **{self.cache_name: cache},
        )
        written = [x for layer in layers for x in (layer.rows, layer.index_rows) if x is not None]
        return out.logits, *written


def _program(model: Any, cache_dtype: torch.dtype) -> Any:
    """What `torch.onnx.export` makes of the model, with caches of this type."""
    try:
        from transformers.exporters import exporter_onnx
        from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

        translations = exporter_onnx._ONNX_TRANSLATION_TABLE
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"transformers {transformers.__version__}: no exporter to ONNX as we know it: {error}"
        ) from error
    config = model.config
    accelerated, implementation = config._attn_implementation == NAME, model.get_experts_implementation()
    accelerate(model)
    try:
        # With any other implementation the graph reads the weights of all experts, not only of the chosen ones.
        model.set_experts_implementation("grouped_mm")
        step = _Step(model)
        names = step.cache_names()
        # Every length is at least two, because torch would fix a length of one.
        b, s_q, capacity = 2, 3, 2 * config.index_topk + 5
        widths = [config.index_head_dim if n.endswith("indexer_keys") else _row_width(config) for n in names]
        arguments = (
            torch.ones(b, s_q, dtype=torch.int64),
            torch.arange(s_q).repeat(b, 1),
            torch.tensor([1, 2]),
            [torch.zeros(1, dtype=cache_dtype).expand(b, capacity, width) for width in widths],
        )
        dim = torch.export.Dim
        tokens = {0: dim("batch"), 1: dim("s_q")}
        shapes = (tokens, tokens, {0: dim("n")}, [{0: dim("batch"), 1: dim("capacity")}] * len(names))
        with torch.no_grad(), experts.traced(), apply_patches("dynamo"), apply_patches("onnx"), _quietly():
            exported = torch.export.export(step, arguments, dynamic_shapes=shapes, strict=False)
            apply_fx_node_fixes("onnx", exported.graph_module)
            program: Any = torch.onnx.export(
                exported,
                args=(),
                input_names=["input_ids", "position_ids", "logits_to_keep", *(f"input.{n}" for n in names)],
                output_names=["logits", *(f"output.{n}" for n in names)],
                custom_translation_table={**translations, **export.translation_table()},
                verbose=False,
            )
            exporter_onnx.apply_onnx_ir_fixes(program)
    except (DsaError, MemoryError):
        raise
    except Exception as error:  # torch's many passes raise errors of any type
        what = f"{type(error).__name__}: {error}"
        raise ModelError(f"export: expected a model that torch {torch.__version__} can export, got: {what}") from error
    finally:
        model.set_experts_implementation(implementation)
        if not accelerated:
            restore(model)
    program.model.opset_imports.setdefault(export.DOMAIN, export.VERSION)
    return program


def _row_width(config: Any) -> int:
    return config.kv_lora_rank + config.qk_rope_head_dim


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' notes about packages and functions that this model does not need."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _name_lengths(model: onnx.ModelProto) -> None:
    """Give the symbols of lengths, which come as s16 and the like, the names that the inputs' documentation has."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    caches = [dims for name, dims in inputs.items() if name.startswith("input.")]
    names = {
        inputs["input_ids"][0].dim_param: "batch",
        inputs["input_ids"][1].dim_param: "s_q",
        inputs["logits_to_keep"][0].dim_param: "n",
        caches[0][1].dim_param: "capacity",
    }
    if "" in names or len(names) != 4:
        raise ModelError(f"export: expected batch, s_q, n and capacity to stay lengths of any size, got {names}")
    symbol = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b")
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.dim_param = symbol.sub(lambda match: names[match[1]], dim.dim_param)


def _expect_one_capacity(model: onnx.ModelProto) -> None:
    """Make the graph refuse caches whose capacities differ: their rows would be those of other sequences.

    ONNX has no assertions, but a lookup behind the end of a table is an error, which says the name of the node.
    """
    graph = model.graph
    caches = [value.name for value in graph.input if value.name.startswith("input.")]
    ranges = {node.output[0] for node in graph.node if node.op_type == "Range"}
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == "position_ids":
                node.input[i] = "checked_position_ids"
        if node.op_type == "Gather" and node.input[0] in ranges:  # the lookup in `_Step.forward`
            node.name = "expect_positions_below_the_capacity"
    capacities = [f"{name}.capacity" for name in caches]
    make = onnx.helper.make_node
    nodes = [make("Shape", [c], [n], start=1, end=2) for c, n in zip(caches, capacities, strict=True)]
    nodes += [
        make("Concat", capacities, ["capacities"], axis=0),
        make("ReduceMax", ["capacities"], ["largest_capacity"]),
        make("ReduceMin", ["capacities"], ["smallest_capacity"]),
        make("Sub", ["largest_capacity", "smallest_capacity"], ["difference_of_capacities"]),
        make("Constant", [], ["one_zero"], value_ints=[0]),
        make("Gather", ["one_zero", "difference_of_capacities"], ["zero"], "expect_caches_of_one_capacity"),
        make("Add", ["position_ids", "zero"], ["checked_position_ids"]),
    ]
    for node in reversed(nodes):
        graph.node.insert(0, node)
