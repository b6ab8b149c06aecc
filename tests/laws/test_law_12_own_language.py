"""Law 12: L_kl is the mean KL(base ‖ aligned) over all tokens of the base model's own texts; 0 where nothing changed."""

from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pykalm.graph.known import known_answers
from pykalm.learn import batches, step
from pykalm.learn.batches import Batch, BatchBuilder
from pykalm.model import own_texts
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.own_texts import OwnTexts, write_own_texts
from tests.laws.common import gradients, largest_difference, replaced, tiny_encoder, tiny_graph, tiny_verbalizer
from tests.tiny_models import FAMILIES, TOKENIZER_SIZE, tiny_model

LENGTH = 14


def written_by_the_base(family: str, num_likely: int) -> OwnTexts:
    model = tiny_model(family, vocab_size=TOKENIZER_SIZE)
    return write_own_texts(model, 1, seed=0, num_texts=3, length=LENGTH, num_likely=num_likely)


def batch_with(encoder: Encoder, texts: OwnTexts, *, share: float = 1.0) -> Batch:
    graph = tiny_graph()
    builder = BatchBuilder(
        graph, tiny_verbalizer(graph), known_answers(graph, ["train"]), encoder.lay_out, explicit=True,
        completion_share=share, own_texts=texts, own_tokens=2 * LENGTH,
    )  # fmt: skip
    return builder.build(graph.triples("train"), np.random.default_rng(3))


def kl_by_loops(encoder: Encoder, family: str, texts: OwnTexts, batch: Batch) -> Tensor:
    """Read every text alone with both models, and take the mean of KL(base ‖ aligned) over all their tokens."""
    base, found = tiny_model(family, vocab_size=TOKENIZER_SIZE).eval(), []
    read = {tuple(batch.trie.token_ids[nodes].tolist()) for nodes in batch.own_nodes.reshape(-1, LENGTH)}
    for text in texts.tokens:
        if tuple(text.tolist()) in read:
            ids = torch.from_numpy(text)[None].long()
            with torch.no_grad():
                wanted = F.log_softmax(base(input_ids=ids).logits[0].float(), -1)
            log_q = F.log_softmax(encoder.causal_lm(input_ids=ids).logits[0].float(), -1)
            found.append((wanted.exp() * (wanted - log_q)).sum(-1))
    assert len(found) == 2
    return torch.cat(found).mean()


def test_kl_and_its_gradient_are_those_of_every_text_read_alone() -> None:
    """All families, packed and not, one graph and cached; half precision of the kept distributions moves it by 1e-3 at most."""
    for family in FAMILIES:
        texts = written_by_the_base(family, TOKENIZER_SIZE - 1)
        for memory_tokens in (1 << 20, 1):
            encoder = tiny_encoder(family, row_tokens=48, chunk_tokens=64)
            batch = batch_with(encoder, texts)
            loss, both = gradients(encoder, batch, memory_tokens=memory_tokens)
            _, without = gradients(encoder, batch, memory_tokens=memory_tokens, kl_weight=0.0)
            encoder.zero_grad()
            expected = kl_by_loops(encoder, family, texts, batch)
            expected.backward()  # type: ignore[no-untyped-call]
            wanted = {name: value.grad for name, value in encoder.trainable().items() if value.grad is not None}
            found = {name: both[name] - without[name] for name in wanted}
            assert abs(loss.kl - expected.item()) < 1e-3 * expected.item(), (family, loss.kl, expected.item())
            whole = [torch.cat([part[name].flatten() for name in sorted(wanted)]) for part in (found, wanted)]
            assert (whole[0] - whole[1]).norm() < 5e-3 * whole[1].norm(), family


def test_an_unchanged_model_has_no_kl_and_no_gradient_of_it() -> None:
    """With few likely tokens too: all others count as one, which both models find equally likely."""
    base = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    texts = write_own_texts(base, 1, seed=0, num_texts=3, length=LENGTH, num_likely=4)
    assert np.abs(np.exp(texts.log_p.astype(np.float64)).sum(-1) - 1).max() < 2e-3
    model = add_adapter(base, kind="lora", rank=4, seed=1)
    encoder = Encoder(model, source_fingerprint="llama", precision="fp32", row_tokens=64, chunk_tokens=256)
    batch = batch_with(encoder, texts)
    loss, with_kl = gradients(encoder, batch, kl_weight=100.0)
    _, without = gradients(encoder, batch, kl_weight=0.0)
    assert 0 <= loss.kl < 1e-5
    assert largest_difference(with_kl, without) < 0.05


def test_lumping_the_unlikely_tokens_never_adds() -> None:
    encoder, found = tiny_encoder(row_tokens=48, chunk_tokens=64), []
    for num_likely in (2, 16, 64, TOKENIZER_SIZE - 1):
        found.append(gradients(encoder, batch_with(encoder, written_by_the_base("llama", num_likely)))[0].kl)
    assert found == sorted(found)
    assert found[0] > 0


def kl_is_reversed() -> AbstractContextManager[None]:
    """Take KL(aligned ‖ base), which forgives what the model no longer says."""

    def wrong(logits: Tensor, likely: Tensor, log_p: Tensor) -> Tensor:
        log_q = logits.log_softmax(-1)
        rest = log_q.scatter(-1, likely, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(-1, likely), rest], dim=-1)
        return F.kl_div(log_p.float().log_softmax(-1), log_q, reduction="sum", log_target=True)

    return replaced(step, "kl_sum", wrong)


def distributions_are_of_the_token_before() -> AbstractContextManager[None]:
    """Hold every token to what the base model said one token earlier."""
    right = OwnTexts.distributions

    def wrong(self: OwnTexts, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        likely, log_p = right(self, numbers)
        return np.roll(likely, 1, axis=0), np.roll(log_p, 1, axis=0)

    return replaced(batches.OwnTexts, "distributions", wrong)


def makers_temperature_bends_the_distributions() -> AbstractContextManager[None]:
    """Keep the probabilities of a model at temperature 0.7."""
    right = own_texts._distributions

    def wrong(causal_lm: object, tokens: Tensor, num_likely: int) -> tuple[Tensor, Tensor]:
        likely, log_p = right(causal_lm, tokens, num_likely)
        return likely, (log_p / 0.7).log_softmax(-1)

    return replaced(own_texts, "_distributions", wrong)


def kl_is_a_sum() -> AbstractContextManager[None]:
    """Forget to divide by the tokens."""
    right = step._written

    def wrong(encoder: Encoder, batch: Batch, states: Tensor, chunk: step._Chunk, **options: int) -> Tensor:
        return right(encoder, batch, states, chunk, **options) * torch.tensor([1.0, len(batch.own_nodes)])

    return replaced(step, "_written", wrong)


BREAKS = {
    "KL is reversed": kl_is_reversed,
    "distributions are of the token before": distributions_are_of_the_token_before,
    "distributions are bent by a temperature": makers_temperature_bends_the_distributions,
    "KL is a sum": kl_is_a_sum,
}
CHECKS = dict.fromkeys(BREAKS, "test_kl_and_its_gradient_are_those_of_every_text_read_alone")
