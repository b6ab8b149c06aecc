"""The objectives as pure functions: dual-view contrast (L_exp), completion (L_imp), nearness to the base model (L_kl)."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.model.own_texts import lumped_log_p

# Finite, so that a row without negatives has a gradient (of zero); exp(MASKED) is exactly 0 in float32.
MASKED = -1e9


def dual_view_loss(
    query: Tensor,
    candidates: Tensor,
    *,
    log_scale: Tensor,
    margin: float,
    positives: Tensor,
    masked: Tensor,
    own_heads: Tensor | None = None,
    views: Literal["both", "query", "candidate"] = "both",
) -> Tensor:
    """Return L_exp = ½ · (L(hr→t) + L(t→hr)), the mean over P positives of both views. METHOD.md §2.

    views "query" is L(hr→t) alone, "candidate" L(t→hr) alone.

    query (B, D) and candidates (C, D): unit rows, each distinct text once; log_scale: log(1/τ), a scalar;
    positives (P, 2): rows (query, candidate) of the batch's triples; masked (B, C): True where (query, candidate) is no
    negative, in either view: every known training triple, so that every positive meets the same negatives and counts once,
    and own heads, unless they are negatives like all others. own_heads (B,): the candidate that is each query's own head, −1
    for none, which is a negative that weighs in either view no more than the hardest other one. docs/method.md §2.
    """
    assert query.dtype == candidates.dtype == torch.float32
    scale = log_scale.float().exp()
    scores = query @ candidates.T * scale
    i, j = positives.T
    every = torch.arange(0 if own_heads is None else len(query), device=query.device)
    own = every if own_heads is None else own_heads.clamp(min=0)
    # One look at the scores: for each there is a gradient as large as all of them.
    picked = scores[torch.cat([i, every]), torch.cat([j, own])]
    true, self_scores = picked[: len(i)], picked[len(i) :]
    if own_heads is not None:
        self_scores = self_scores.masked_fill(own_heads < 0, MASKED)
    negative = scores.masked_fill(masked, MASKED)
    losses = []
    if views != "candidate":
        losses.append(_log_sum_exp(negative, self_scores, every, scale, dim=1)[i])
    if views != "query":
        losses.append(_log_sum_exp(negative, self_scores, own, scale, dim=0)[j])
    return F.softplus(torch.stack(losses) - (true - margin * scale)).mean()


def _log_sum_exp(scores: Tensor, more: Tensor, place: Tensor, scale: Tensor, *, dim: int) -> Tensor:
    """Return log Σ exp of scores along dim, and of more (n,), at place (n,), each counted as at most the largest score there.

    What is above the largest is taken off as a constant in cosines: the share of the softmax that is left is the weight of
    its pull, and the temperature's gradient is that of the value.
    """
    found = scores.logsumexp(dim)
    if not len(more):
        return found
    largest = scores.detach().amax(dim)
    above = more - largest[place]
    share = torch.exp(above - above.detach().clamp(min=0) * (scale / scale.detach()))
    return largest + ((found - largest).exp().index_add(0, place, share)).log()


def completion_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed −log p of targets (T,) under float32 logits (T, V); divide once by what the step counted.

    METHOD.md §3.
    """
    assert logits.dtype == torch.float32
    return F.cross_entropy(logits, targets, reduction="sum")


def kl_sum(logits: Tensor, likely: Tensor, log_p: Tensor) -> Tensor:
    """Return the summed KL(base ‖ model), in nats, at T places, from float32 logits (T, V). docs/method.md §4.

    likely (T, K): tokens; log_p (T, K + 1): log-probabilities that the base model gives them, and last all others together.
    All others count as one token, so this is at most the KL over all tokens; that of equal models is 0.
    """
    assert logits.dtype == torch.float32
    wanted = log_p.float().log_softmax(-1)  # kept in half precision, they do not sum to 1 exactly
    return F.kl_div(lumped_log_p(logits, likely), wanted, reduction="sum", log_target=True)
