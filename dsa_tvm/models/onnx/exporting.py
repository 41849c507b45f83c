"""From a model of Transformers to an ONNX model with nodes of ``ai.dsa``, for prefill and decode."""

from __future__ import annotations

import contextlib
import errno
import inspect
import logging
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from ... import export
from ...errors import ArgumentError, ModelError
from ...runtime.files import sync_directory
from ..checkpoint import load_model
from ..families import NAME
from ..transformers import accelerate, restore

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
#: What lies beside the weights in a checkpoint, and a program that generates tokens wants to have.
_COMPANIONS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
#: Room for the graph and its bodies, beside the weights.
_GRAPH_BYTES = 32 << 20
_DTYPES = (torch.float32, torch.float16)


def export_checkpoint(
    checkpoint: str | Path,
    directory: str | Path,
    *,
    layers: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    bodies: bool = True,
) -> None:
    """Export a published checkpoint, see `export_model` and `dsa_tvm.models.checkpoint.load_model`.

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
    bodies : bool
        Whether nodes get bodies of standard operators.

    Raises
    ------
    ArgumentError, ModelError, OSError
        Nothing is at `directory` then that was not there before.
    """
    _check_dtype(dtype)
    with _made_whole(Path(directory)) as made:
        model = load_model(checkpoint, dtype=dtype, layers=layers)
        _write(model, made, bodies)
        for name in _COMPANIONS:
            if (source := Path(checkpoint) / name).is_file():
                shutil.copyfile(source, made / name)


def export_model(model: torch.nn.Module, directory: str | Path, *, bodies: bool = True) -> None:
    """Export a loaded model to ``model.onnx`` and ``model.onnx.data``, with its configuration beside them.

    Parameters
    ----------
    model : DeepseekV32ForCausalLM or GlmMoeDsaForCausalLM
        In float32 or float16, on the CPU. It is left as it was.
    directory : str or Path
        Made as a whole, at the end. It must not exist, or be empty.
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
    _check_dtype(next(model.parameters()).dtype)
    with _made_whole(Path(directory)) as made:
        _write(model, made, bodies)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in _DTYPES:
        raise ArgumentError(
            f"export: dtype: expected float32 or float16, got {str(dtype).removeprefix('torch.')}: ONNX Runtime's CPU "
            "provider has no bfloat16 kernels for the projections, norms and experts"
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
    made = directory.parent / f".{directory.name}.{secrets.token_hex(4)}"
    made.mkdir()
    try:
        yield made
        for path in made.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_directory(made)
        made.rename(directory)
        sync_directory(directory.parent)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _write(model: Any, directory: Path, bodies: bool) -> None:
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    if shutil.disk_usage(directory).free < weights + _GRAPH_BYTES:
        # Known before minutes of work, not after.
        needed = f"{os.strerror(errno.ENOSPC)} for {weights / 2**30:.1f} GiB of weights"
        raise OSError(errno.ENOSPC, needed, str(directory.parent))
    program = _program(model)
    path = directory / MODEL
    program.save(str(path), external_data=True)
    graph = onnx.load(path, load_external_data=False)
    _name_lengths(graph)
    _forget_sources(graph)
    if bodies:
        export.attach_bodies(graph)
    path.write_bytes(graph.SerializeToString())
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
        self.rows, self.index_rows, self.positions = rows, indexer_keys, positions
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Latents and rope keys into the rows, all of which are handed out."""
        rows = torch.cat([key_states, value_states], -1)[:, 0]
        self.rows = torch.ops.dsa_tvm.write_rows(self.rows, rows, self.positions)
        return self.rows[:, None], key_states.new_empty(key_states.shape[0], 1, 1, 0)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Indexer keys into theirs."""
        self.index_rows = torch.ops.dsa_tvm.write_rows(self.index_rows, indexer_key_states, self.positions)
        return self.index_rows


class _Step(torch.nn.Module):
    """The model as a function of tensors."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        config = model.config
        self.full = [kind == "full" for kind in getattr(config, "indexer_types", None) or []]
        self.full = self.full or [True] * config.num_hidden_layers
        parameters = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in parameters else "past_key_values"

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
        # Looked up and not only computed: ONNX Runtime refuses to look up what is behind the capacity. Nothing else
        # would: rows of there are not written, and the next sequence's would be read.
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


def _program(model: Any) -> Any:
    """What `torch.onnx.export` makes of the model."""
    try:
        from transformers.exporters import exporter_onnx
        from transformers.exporters.utils import apply_fx_node_fixes, apply_patches

        translations = exporter_onnx._ONNX_TRANSLATION_TABLE
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"transformers {transformers.__version__}: no exporter to ONNX as we know it: {error}"
        ) from error
    config = model.config
    accelerated, experts = config._attn_implementation == NAME, model.get_experts_implementation()
    accelerate(model)
    try:
        # The only one whose graph reads the weights of those experts that are chosen.
        model.set_experts_implementation("grouped_mm")
        step = _Step(model)
        names = step.cache_names()
        dtype = next(model.parameters()).dtype
        # Two at least of everything: torch would fix a length of one.
        b, s_q, capacity = 2, 3, 2 * config.index_topk + 5
        widths = [config.index_head_dim if n.endswith("indexer_keys") else _row_width(config) for n in names]
        arguments = (
            torch.ones(b, s_q, dtype=torch.int64),
            torch.arange(s_q).repeat(b, 1),
            torch.tensor([1, 2]),
            [torch.zeros(1, dtype=dtype).expand(b, capacity, width) for width in widths],
        )
        dim = torch.export.Dim
        tokens = {0: dim("batch"), 1: dim("s_q")}
        shapes = (tokens, tokens, {0: dim("n")}, [{0: dim("batch"), 1: dim("capacity")}] * len(names))
        with torch.no_grad(), apply_patches("dynamo"), apply_patches("onnx"), _quietly():
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
    finally:
        model.set_experts_implementation(experts)
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
