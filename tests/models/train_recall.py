"""Train the small model that README's figure of `dsa-tvm recall` shows.

``python tests/models/train_recall.py DIR`` takes about twenty minutes on one core. ``--seconds`` does a part of it, and
the next call goes on from there. The model reads the bytes of Python's standard library as tokens. It first learns the
text with dense attention. Then its indexer learns to score keys as that attention does: the dense warm-up of the
DeepSeek-V3.2 technical report, section 2.1.1. Every tenth file, `HELD_OUT` among them, is not trained on.
"""

from __future__ import annotations

import argparse
import os
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

HELD_OUT = "argparse.py"
#: Name, steps, sequences a step, their length, learning rate. Short sequences first: they are cheaper.
PHASES = (
    ("text", 1400, 8, 256, 2e-3),
    ("text", 90, 1, 2048, 1e-3),
    ("indexer", 160, 1, 2048, 2e-3),
)
WARM_UP = 50


def config() -> DeepseekV32Config:
    """Four layers, two million parameters."""
    return DeepseekV32Config(
        vocab_size=256,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        first_k_dense_replace=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        q_lora_rank=96,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=32,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=256,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=None,
    )


def corpus(held_out: bool = False) -> torch.Tensor:
    """Bytes [n] of the standard library's top-level modules."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    chosen = [p for i, p in enumerate(files) if (i % 10 == 0 or p.name == HELD_OUT) == held_out]
    return torch.frombuffer(bytearray(b"\n".join(p.read_bytes() for p in chosen)), dtype=torch.uint8)


def batch(text: torch.Tensor, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Pieces [count, length + 1] of the text at random places."""
    starts = torch.randint(len(text) - length, (count,), generator=generator).tolist()
    return torch.stack([text[start : start + length + 1] for start in starts]).long()


@contextmanager
def dense(model: DeepseekV32ForCausalLM) -> Iterator[list[Any]]:
    """Attention to every key: indexers select all, and note what they are given instead of scoring it."""
    noted: list[Any] = []

    def all_keys(indexer: Any) -> Callable[..., torch.Tensor]:
        def forward(hidden_states, q_resid, position_embeddings, *args, **kwargs):
            noted.append((indexer, hidden_states.detach(), q_resid.detach(), position_embeddings))
            b, s, _ = hidden_states.shape
            return torch.arange(s, dtype=torch.int32).expand(b, s, s)

        return forward

    indexers = [block.self_attn.indexer for block in model.model.layers]
    for indexer in indexers:
        indexer.forward = all_keys(indexer)
    try:
        yield noted
    finally:
        for indexer in indexers:
            del indexer.forward


def scores(indexer: Any, x: torch.Tensor, q_latent: torch.Tensor, rotary: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Scores [b, s, s] of an indexer, with derivatives: equation 1 of the report."""
    rope = indexer.qk_rope_head_dim
    q = indexer.wq_b(q_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(x)).unsqueeze(2)
    q_rope, k_rope = apply_rotary_pos_emb(q[..., :rope], k[..., :rope], *rotary, unsqueeze_dim=2)
    q, k = torch.cat([q_rope, q[..., rope:]], -1), torch.cat([k_rope, k[..., rope:]], -1)[:, :, 0]
    weights = indexer.weights_proj(x) * indexer.n_heads**-0.5 * indexer.softmax_scale
    total = x.new_zeros(*x.shape[:2], x.shape[1])
    for head in range(indexer.n_heads):
        total = total + weights[..., head, None] * (q[:, :, head] @ k.mT).relu()
    return total


def text_loss(model: DeepseekV32ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the next byte, in nats."""
    with dense(model):
        logits = model(tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def indexer_loss(model: DeepseekV32ForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """KL divergence of the scores' softmax from dense attention, summed over heads and normalized: equation 3."""
    with dense(model) as noted, torch.no_grad():
        model.set_attn_implementation("eager")
        attentions = model(tokens[:, :-1], use_cache=False, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    s = tokens.shape[1] - 1
    later = torch.ones(s, s, dtype=torch.bool).triu(1)
    loss = torch.zeros(())
    for (indexer, *given), attention in zip(noted, attentions, strict=True):
        target = functional.normalize(attention.sum(1), p=1, dim=-1)
        guessed = scores(indexer, *given).masked_fill(later, -torch.inf).log_softmax(-1)
        terms = torch.where(later | (target <= 0), 0.0, target * (target.clamp(min=1e-30).log() - guessed))
        loss = loss + terms.sum(-1).mean()
    return loss / len(attentions)


class Training:
    """The model and where its training is, kept in a directory."""

    def __init__(self, directory: Path):
        torch.manual_seed(0)
        self.directory = directory
        self.model = DeepseekV32ForCausalLM(config())
        self.generator = torch.Generator().manual_seed(1)
        self.phase, self.step = 0, 0
        self.optimizer = self._optimizer()
        if (path := directory / "training.pt").exists():
            kept = torch.load(path)
            self.phase, self.step = kept["phase"], kept["step"]
            self.model.load_state_dict(kept["model"])
            self.generator.set_state(kept["generator"])
            self.optimizer = self._optimizer()
            self.optimizer.load_state_dict(kept["optimizer"])

    def _optimizer(self) -> torch.optim.Optimizer:
        kind, rate = PHASES[self.phase][0], PHASES[self.phase][4]
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_((".indexer." in name) == (kind == "indexer"))
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)

    def save(self) -> None:
        """Write the state beside the old one, and then over it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "training.pt"
        state = {"phase": self.phase, "step": self.step, "generator": self.generator.get_state()}
        torch.save(
            state | {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, f"{path}.partial"
        )
        os.replace(f"{path}.partial", path)

    def run(self, seconds: float) -> bool:
        """Train for so long; whether all is done."""
        text, end = corpus(), time.monotonic() + seconds
        while time.monotonic() < end:
            kind, steps, count, length, rate = PHASES[self.phase]
            if self.step >= steps:
                if self.phase + 1 == len(PHASES):
                    return True
                self.phase, self.step = self.phase + 1, 0
                self.optimizer = self._optimizer()
                continue
            for group in self.optimizer.param_groups:
                group["lr"] = rate * min((self.step + 1) / WARM_UP, 1 - 0.9 * self.step / steps)
            tokens = batch(text, count, length, self.generator)
            loss = (text_loss if kind == "text" else indexer_loss)(self.model, tokens)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            if self.step % 10 == 0:
                print(f"{kind}, {length} bytes: step {self.step} of {steps}, loss {loss.item():.3f}", flush=True)
            self.step += 1
        return False


def main() -> None:
    """Train, and write the checkpoint when all is done."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    training = Training(args.directory)
    if not training.run(args.seconds):
        training.save()
        return
    training.save()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        lost = [text_loss(training.model, batch(corpus(held_out=True), 1, 2048, generator)).item() for _ in range(16)]
    print(f"held-out text: {sum(lost) / len(lost) / 0.6931:.2f} bits a byte")
    training.model.save_pretrained(args.directory / "checkpoint")


if __name__ == "__main__":
    main()
