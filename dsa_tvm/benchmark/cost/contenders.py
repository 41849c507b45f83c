"""One attention layer, run by Transformers, by us, or without selection."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import transformers

from ...errors import ArgumentError, ModelError
from ...models import layer as operators
from ...models.checkpoint import DTYPES as TYPES
from ...models.checkpoint import Checkpoint
from ...models.families import cache_name, family_of
from ...models.row_cache import RowCache
from ...models.transformers import NAME, accelerate
from .dense import DECODE, PREFILL, DenseAttention
from .problem import LAYERS, Problem

#: Tokens of the check, how many of them one by one, and keys that are selected then.
CHECKED, CHECKED_STEPS, CHECKED_TOPK = 160, 4, 48
#: Calls that the shares are medians of.
_SHARE_CALLS = 5


class _Asked(Exception):
    """Ends a forward of the model where it reaches the attention."""


class Layer:
    """A model of one layer with an attention that is measured, and an MLP that is as small as may be.

    Parameters
    ----------
    problem : Problem
    implementation : str
        What the configuration says of the attention.

    Raises
    ------
    ArgumentError
        A layer that the checkpoint does not have, or a setting that the configuration refuses.
    ModelError
        As `load_model`, or a layer without an indexer.
    """

    def __init__(self, problem: Problem, implementation: str) -> None:
        self.dtype = TYPES[problem.dtype]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.full_config, attention = _attention(problem, self.dtype)
        self.family = family_of(self.full_config.model_type)
        config = _small(self.full_config)
        # Of the rest only the first norm and the rotary embedding are used, so nothing else gets memory.
        with torch.device("meta"):
            self.model = getattr(transformers, f"{self.family.prefix}Model")(config).eval()
        self.model.rotary_emb = type(self.model.rotary_emb)(config=config)
        norm = self.model.layers[0].input_layernorm
        norm.weight = torch.nn.Parameter(torch.ones(config.hidden_size, dtype=self.dtype), requires_grad=False)
        self.attention = attention
        attention.config, attention.layer_idx = config, 0
        attention.indexer.config, attention.indexer.layer_idx = config, 0
        self.model.layers[0].self_attn = attention
        if implementation == NAME:
            accelerate(self.model)
        else:
            self.model.set_attn_implementation(implementation)
        self.config = config

    def arguments(self, x: torch.Tensor, cache: Any) -> dict[str, Any]:
        """What the model calls its attention with: mask, position embeddings and all."""
        found: dict[str, Any] = {}

        def keep(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            found.update(kwargs)
            raise _Asked

        handle = self.attention.register_forward_pre_hook(keep, with_kwargs=True)
        name = cache_name(type(self.model).forward)
        try:
            self.model(inputs_embeds=x, use_cache=True, **{name: cache})
        except _Asked:
            pass
        finally:
            handle.remove()
        return found

    def hidden(self, length: int, seed: int = 1) -> torch.Tensor:
        """Seeded hidden states [1, length, hidden]."""
        return self.normal((1, length, self.config.hidden_size), seed)

    def fill(self, cache: Any, length: int) -> None:
        """Put so many seeded tokens into a cache: normally distributed, as the norms leave latents and keys."""
        if not length:
            return
        latents = self.normal((1, 1, length, self.attention.kv_lora_rank), 2)
        cache.update(latents, self.normal((1, 1, length, self.attention.qk_rope_head_dim), 3), 0)
        del latents
        cache.update_indexer(self.normal((1, length, self.attention.indexer.head_dim), 4), 0)

    def normal(self, shape: tuple[int, ...], seed: int) -> torch.Tensor:
        """Seeded numbers with a mean of 0 and a variance of 1."""
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(self.dtype)


def _attention(problem: Problem, dtype: torch.dtype) -> tuple[Any, Any]:
    """The configuration of the whole model, and an attention with weights."""
    if problem.checkpoint is not None:
        with Checkpoint(problem.checkpoint, dtype=dtype) as checkpoint:
            config, number = checkpoint.config, problem.layer
            if not 0 <= number < config.num_hidden_layers:
                raise ArgumentError(f"cost: layer: expected 0..{config.num_hidden_layers - 1}, got {number}")
            if getattr(config, "indexer_types", ["full"] * (number + 1))[number] != "full":
                raise ModelError(f"cost: layer: expected one with an indexer, got {number}, which shares a selection")
            made = checkpoint.family.attention
            return config, checkpoint.read(lambda: made(config, number), f"model.layers.{number}.self_attn.")
    kind, settings = LAYERS[problem.preset]
    family = family_of(kind)
    changes = {**settings, **problem.changes}
    if "num_attention_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    config = getattr(transformers, f"{family.prefix}Config")(**changes)
    with torch.device("meta"):
        attention = family.attention(config, 0)
    attention = attention.to_empty(device="cpu")
    for name, parameter in attention.named_parameters():
        # Products keep the size of their inputs, and norms change nothing.
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            torch.nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
    return config, attention.requires_grad_(False).to(dtype).eval()


def _small(config: Any) -> Any:
    """The configuration of a model with one layer and little beside its attention."""
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    small.vocab_size, small.intermediate_size, small.pad_token_id = 8, 8, None
    small.mlp_layer_types, small.layer_types = ["dense"], list(config.layer_types[:1])
    if hasattr(small, "indexer_types"):
        small.indexer_types = ["full"]
    return small


class Contender:
    """A method at a position: `prepare`, then `call` as often as wanted.

    Parameters
    ----------
    problem : Problem
    method : str
        A key of `METHODS`.
    """

    def __init__(self, problem: Problem, method: str) -> None:
        self.method, self.problem = method, problem
        self.layer = Layer(problem, {"ours": NAME, "dense": "eager"}.get(method, method))
        attention, module = self.layer.attention, self.layer.family.module
        self._dense = DenseAttention(attention, module.apply_rotary_pos_emb_interleave) if method == "dense" else None
        self._arguments: dict[str, Any] = {}
        self._restore: Callable[[], None] = lambda: None

    def describe(self) -> dict[str, Any]:
        """The sizes of the layer, as plain values."""
        config = self.layer.full_config
        names = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
        more = ("qk_rope_head_dim", "v_head_dim", "index_n_heads", "index_head_dim", "index_topk", "num_hidden_layers")
        sizes = {name: getattr(config, name) for name in names + more}
        return {"model_type": config.model_type, **sizes, "max_position_embeddings": config.max_position_embeddings}

    @property
    def form(self) -> str | None:
        """Of dense attention: which of its forms is used."""
        return self._dense.form if self._dense else None

    def release(self) -> None:
        """Drop cache and inputs."""
        self._arguments, self._restore = {}, lambda: None
        if self._dense:
            self._dense.form = None

    @torch.no_grad()
    def prepare(self, phase: str, position: int) -> None:
        """Fill a cache, so that the last token of a call is at a position, counted from 1."""
        self.release()
        queries = self.problem.queries(phase, position)
        self._set(self.layer.hidden(queries), position)

    def _set(self, x: torch.Tensor, position: int) -> None:
        s_q = x.shape[1]
        if self._dense is None:
            config = self.layer.config
            cache = RowCache(config, position) if self.method == "ours" else transformers.DynamicCache(config=config)
            self.layer.fill(cache, position - s_q)
            self._arguments = self.layer.arguments(x, cache)
            kept = dict(cache.layers[0].__dict__)
            self._restore = lambda: cache.layers[0].__dict__.update(kept)
            return
        rows = self.layer.normal((position, self._row_width), 2)
        self._arguments = {"hidden_states": self._normed(x), "position_embeddings": self._embeddings(x, position)}
        self._arguments["rows"] = rows

    @property
    def _row_width(self) -> int:
        return self.layer.attention.kv_lora_rank + self.layer.attention.qk_rope_head_dim

    def _normed(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer.model.layers[0].input_layernorm(x)

    def _embeddings(self, x: torch.Tensor, position: int) -> Any:
        return self.layer.model.rotary_emb(x, position_ids=torch.arange(position - x.shape[1], position)[None])

    @torch.no_grad()
    def call(self) -> torch.Tensor:
        """The layer's output [1, s_q, hidden]; the cache is afterwards what it was before."""
        if self._dense is not None:
            return self._dense(**self._arguments)
        out = self.layer.attention(**self._arguments)[0]
        self._restore()
        return out

    @torch.no_grad()
    def checked(self) -> dict[str, Any]:
        """Outputs for a short prompt and some steps behind it, as arrays, to be compared with those of others.

        Returns
        -------
        dict
            "all": what comes out where every key is attended to, [CHECKED, hidden], by each form. Of those that select,
            "some": where few keys are; "selected": which, bool [CHECKED, CHECKED]. Of ours, "scores" of keys by query.
        """
        x = self.layer.hidden(CHECKED, seed=5)
        parts = [CHECKED - CHECKED_STEPS, *[1] * CHECKED_STEPS]
        if self._dense is not None:
            return {"all": [self._run_dense(x.split(parts, 1), i) for i in range(max(len(PREFILL), len(DECODE)))]}
        indexer = self.layer.attention.indexer
        topk = indexer.index_topk
        try:
            found = {}
            for name, count in (("all", CHECKED), ("some", CHECKED_TOPK)):
                indexer.index_topk = count
                out, selected, scores = self._run_parts(x, parts)
                found[name] = [out]
            return {**found, "selected": selected, "scores": scores}
        finally:
            indexer.index_topk = topk

    def _run_dense(self, parts: Sequence[torch.Tensor], number: int) -> Any:
        """Outputs of one form for the prompt, and of one for the steps."""
        assert self._dense is not None
        rows, outs, end = self.layer.normal((CHECKED, self._row_width), 2), [], 0
        for part in parts:
            forms = list(PREFILL if part.shape[1] > 1 else DECODE)
            self._dense.form = forms[number % len(forms)]
            end += part.shape[1]
            outs.append(self._dense(self._normed(part), self._embeddings(part, end), rows[:end]))
        self._dense.form = None
        return _array(torch.cat(outs, 1)[0])

    def _run_parts(self, x: torch.Tensor, parts: list[int]) -> tuple[Any, Any, Any]:
        config, indexer = self.layer.config, self.layer.attention.indexer
        cache = RowCache(config) if self.method == "ours" else transformers.DynamicCache(config=config)
        outs, selections = [], []
        handle = indexer.register_forward_hook(lambda module, args, out: selections.append(out[0]))
        scores = torch.full((CHECKED, CHECKED), -torch.inf)
        try:
            with _swapped("indexer_topk", _recording(scores)) if self.method == "ours" else nullcontext():
                for part in x.split(parts, 1):
                    outs.append(self.layer.attention(**self.layer.arguments(part, cache))[0])
        finally:
            handle.remove()
        chosen = torch.zeros(CHECKED, CHECKED + 1, dtype=torch.bool)
        row = 0
        for selection in selections:
            indices = selection.long()
            indices = torch.where((indices < 0) | (indices >= CHECKED), CHECKED, indices)
            chosen[row : row + len(indices)].scatter_(1, indices, True)
            row += len(indices)
        # Transformers selects keys that come later, too, where there are too few, and hides them afterwards.
        return _array(torch.cat(outs, 1)[0]), chosen[:, :CHECKED].tril().numpy(), scores.numpy()

    @torch.no_grad()
    def shares(self) -> dict[str, float]:
        """Which part of the time of our call goes where; the sum is 1.

        The library scores and selects in one call. How much of it is which, is told by the times of the two operators
        one after the other on the same inputs.

        Returns
        -------
        dict
            "indexer", "selection", "attention", and "projections": all that torch does, with norms and the cache.
        """
        calls = [self._share_call() for _ in range(_SHARE_CALLS if self._quick else 1)]
        total, both, attention, scoring, selecting = (statistics.median(x) for x in zip(*calls, strict=True))
        indexer = both * scoring / (scoring + selecting) if both else 0.0
        parts = {"indexer": indexer, "selection": both - indexer, "attention": attention}
        return {"projections": 1 - sum(parts.values()) / total, **{n: x / total for n, x in parts.items()}}

    @property
    def _quick(self) -> bool:
        begin = time.perf_counter()
        self.call()
        return time.perf_counter() - begin < 1

    def _share_call(self) -> tuple[float, ...]:
        taken = {"both": 0.0, "attention": 0.0}
        inputs: list[tuple[Any, ...]] = []

        def timed(name: str, function: Callable, keep: bool = False) -> Callable:
            def call(*args: Any, **kwargs: Any) -> Any:
                if keep:
                    inputs.append((args, kwargs["topk"]))
                begin = time.perf_counter()
                out = function(*args, **kwargs)
                taken[name] += time.perf_counter() - begin
                return out

            return call

        with (
            _swapped("indexer_topk", timed("both", operators.indexer_topk, keep=True)),
            _swapped("sparse_mla", timed("attention", operators.sparse_mla)),
        ):
            begin = time.perf_counter()
            self.call()
            total = time.perf_counter() - begin
        scoring = selecting = 0.0
        for args, topk in inputs:
            begin = time.perf_counter()
            scores = operators.lightning_indexer(*args)
            between = time.perf_counter()
            operators.topk_indices(scores, args[3], args[4], topk=topk)
            scoring, selecting = scoring + between - begin, selecting + time.perf_counter() - between
        return total, taken["both"], taken["attention"], scoring, selecting


def _recording(scores: torch.Tensor) -> Callable:
    """`indexer_topk` that puts the scores of the queries down, each in the row of its position."""
    original = operators.indexer_topk

    def call(*args: Any, topk: int) -> Any:
        found, end = operators.lightning_indexer(*args), args[4].long()
        scores[end - 1, : found.shape[1]] = found[:, : scores.shape[1]]
        return original(*args, topk=topk)

    return call


@contextmanager
def _swapped(name: str, function: Callable) -> Any:
    """Another function in place of a call of the library."""
    before = getattr(operators, name)
    setattr(operators, name, function)
    try:
        yield
    finally:
        setattr(operators, name, before)


def _array(x: torch.Tensor) -> Any:
    return x.float().numpy()
