"""The optimisation of the embedded language model: one pass of the head without a [tokens, vocabulary] graph, one loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tsae.lm.embedded_text import Rows

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

CHUNK = 512  # tokens whose logits exist at a time


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How the embedded language model is made; recorded beside its weights."""

    seed: int = 0
    vocabulary: int = 4096
    context_length: int = 128
    min_length: int = 16
    activation_dim: int = 128
    layers: int = 4
    heads: int = 4
    initial_std: float = 0.06
    tokens: int = 10_000_000
    batch_rows: int = 16
    lr: float = 3e-3
    warmup_tokens: int = 200_000
    decay_share: float = 0.3
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0


class _HeadLoss(torch.autograd.Function):
    """Summed cross-entropy of the output layer; logits live for one chunk, and their gradient is taken on the spot."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:  # [T, D], [V, D], [T] -> []
        loss, low = hidden.new_zeros(()), weight.bfloat16()
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), CHUNK):
            part, goal = hidden[start : start + CHUNK].bfloat16(), target[start : start + CHUNK, None]
            scores = (part @ low.T).float()
            normaliser = scores.logsumexp(1, keepdim=True)
            loss += (normaliser - scores.gather(1, goal)).sum()
            error = scores.sub_(normaliser).exp_()
            error.scatter_add_(1, goal, torch.full_like(normaliser, -1.0))
            error = error.bfloat16()
            hidden_gradient[start : start + CHUNK] = error @ low
            weight_gradient += error.T @ part
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        return gradients[0] * hidden_gradient, gradients[0] * weight_gradient, None


def summed_loss(model: GPTNeoXForCausalLM, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, int]:
    """Summed next-token loss in nats over the real positions of [S, L] rows, and how many they are."""
    hidden = model.gpt_neox(input_ids=tokens, use_cache=False).last_hidden_state
    mask = torch.arange(1, tokens.shape[1]) < lengths[:, None]
    flat = hidden[:, :-1][mask].float()
    with torch.autocast("cpu", enabled=False):
        return _HeadLoss.apply(flat, model.lm_head.weight, tokens[:, 1:][mask]), len(flat)


@torch.no_grad()
def mean_loss(model: GPTNeoXForCausalLM, rows: Rows, batch_rows: int = 64) -> float:
    """Mean next-token loss in nats over rows, in float32."""
    total, count = 0.0, 0
    for start in range(0, len(rows.tokens), batch_rows):
        tokens, lengths = (torch.from_numpy(part[start : start + batch_rows]) for part in (rows.tokens, rows.lengths))
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
        mask = torch.arange(1, tokens.shape[1]) < lengths[:, None]
        total += float(nn.functional.cross_entropy(logits[mask].float(), tokens[:, 1:][mask], reduction="sum"))
        count += int(mask.sum())
    return total / count


def initial_model(recipe: Recipe) -> GPTNeoXForCausalLM:
    """The untrained GPT-NeoX of the recipe, float32."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(recipe.seed)
    config = GPTNeoXConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.activation_dim,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.activation_dim,
        max_position_embeddings=recipe.context_length,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=recipe.initial_std,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return GPTNeoXForCausalLM(config)


def batches(rows: Rows, batch_rows: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of whole rows, in a fresh seeded order each epoch; an incomplete last batch is left out."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(rows.tokens))
        for start in range(0, len(order) - batch_rows + 1, batch_rows):
            chosen = order[start : start + batch_rows]
            yield torch.from_numpy(rows.tokens[chosen]), torch.from_numpy(rows.lengths[chosen])


def learning_rate(recipe: Recipe, seen: int) -> float:
    """Linear warm-up, a plateau, and a linear decay to zero over the last `decay_share` of the token budget."""
    left = max(recipe.tokens - seen, 0) / (recipe.decay_share * recipe.tokens)
    return recipe.lr * min((seen + 1) / recipe.warmup_tokens, 1.0, left)


def pretrain(
    model: GPTNeoXForCausalLM, rows: Rows, recipe: Recipe, report: Callable[[int, int, float], None]
) -> tuple[int, int]:
    """Train in place with AdamW in bfloat16 autocast; `report(step, tokens, smoothed loss)` after each step.

    Returns the steps taken and the real tokens seen.
    """
    # At rows this short, plain matrix products are faster on a CPU than its fused attention kernel's backward pass.
    model.set_attn_implementation("eager")
    model.train()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=recipe.betas, fused=True)
    step, seen, smooth = 0, 0, math.nan
    for tokens, lengths in batches(rows, recipe.batch_rows, recipe.seed):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, seen)
        with torch.autocast("cpu", torch.bfloat16):
            loss, count = summed_loss(model, tokens, lengths)
        (loss / count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        step, seen = step + 1, seen + int(lengths.sum())
        value = float(loss.detach()) / count
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        report(step, seen, smooth)
        if seen >= recipe.tokens:
            break
    model.eval()
    return step, seen
