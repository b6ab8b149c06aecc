"""The two objectives as pure functions of states: dual-view contrast (L_exp) and triple completion (L_imp)."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Finite, so that a row without negatives has a gradient (of zero); exp(MASKED) is exactly 0 in float32.
MASKED = -1e9

BANK_SCORES_AT_ONCE = 1 << 24
"""Scores of queries against a bank, float32, that are held at the same time: 64 MB."""


def dual_view_loss(
    query: Tensor,
    candidates: Tensor,
    *,
    log_scale: Tensor,
    margin: float,
    positives: Tensor,
    known: Tensor,
    bank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return L_exp = ½ · (L(hr→t) + L(t→hr)), the mean over P positives of both views. METHOD.md §2.

    query (B, D) and candidates (C, D): unit rows, each distinct text once; log_scale: log(1/τ), a scalar;
    positives (P, 2): rows (query, candidate) of the batch's triples; known (B, C): True where (query, candidate) is any
    known training triple. A known pair is never a negative, in either view, so every positive meets the same negatives
    and counts once.

    bank: vectors (M, D) of further candidates and the pairs (K, 2) of queries with known answers among them. They are
    negatives in L(hr→t) alone and constants: no gradient reaches them.
    """
    assert query.dtype == candidates.dtype == torch.float32
    scale = log_scale.float().exp()
    scores = query @ candidates.T * scale
    i, j = positives.T
    positive = scores[i, j] - margin * scale
    negative = scores.masked_fill(known, MASKED)
    tail_negatives = negative.logsumexp(dim=1)
    if bank is not None:
        tail_negatives = torch.logaddexp(tail_negatives, _bank_log_sum(query * scale, *bank))
    tails = F.softplus(tail_negatives[i] - positive)
    heads = F.softplus(negative.logsumexp(dim=0)[j] - positive)
    return (tails.mean() + heads.mean()) / 2


def _bank_log_sum(query: Tensor, bank: Tensor, known: Tensor) -> Tensor:
    """Return (B,) log Σ_m e^(q · bank_m) over the pairs that are not known; query (B, D) carries the scale.

    The gradient of a row is the mean of the bank under its softmax. It is computed beside the value, so that the B · M
    scores are built in parts, once, and never kept.
    """
    values, means = [], []
    step = max(1, BANK_SCORES_AT_ONCE // max(1, len(bank)))
    with torch.no_grad():
        for start in range(0, len(query), step):
            inside = (known[:, 0] >= start) & (known[:, 0] < start + step)
            rows, columns = known[inside].T
            scores = query[start : start + step] @ bank.T
            scores[rows - start, columns] = MASKED
            values.append(scores.logsumexp(dim=1))
            means.append(scores.sub_(values[-1][:, None]).exp_() @ bank)
    # The second term is 0; it carries the gradient.
    return torch.cat(values) + ((query - query.detach()) * torch.cat(means)).sum(dim=1)


def completion_loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the summed −log p of targets (T,) under float32 logits (T, V); divide once by what the step counted.

    METHOD.md §3.
    """
    assert logits.dtype == torch.float32
    return F.cross_entropy(logits, targets, reduction="sum")
