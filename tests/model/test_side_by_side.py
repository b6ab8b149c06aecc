"""Claims about passes side by side: their order, their threads, their errors, and when they are not taken."""

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, RwkvConfig

from pykalm.model.encoder import Encoder
from pykalm.model.side_by_side import AHEAD, _pool, side_by_side
from tests.laws.common import tiny_encoder
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_whatever_takes_longest() -> None:
    def work(piece: int) -> int:
        time.sleep(0.05 if piece == 0 else 0)
        return piece * piece

    assert list(side_by_side(work, range(20), at_once=4)) == [piece * piece for piece in range(20)]
    assert list(side_by_side(work, [], at_once=4)) == []


@pytest.mark.parametrize(
    ("at_once", "pieces", "threads"), [(4, 9, 1), (2, 9, 2), (9, 9, 1), (4, 3, 2), (4, 1, 4), (1, 9, 4)]
)
def test_threads_are_shared_out_among_those_at_work(at_once: int, pieces: int, threads: int) -> None:
    found = list(side_by_side(lambda _: torch.get_num_threads(), range(pieces), at_once=at_once))
    assert found == [threads] * pieces
    assert torch.get_num_threads() == 4
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [4], "a thread that nobody told has all"


def test_as_many_are_at_work_as_asked_for() -> None:
    meet = threading.Barrier(4, timeout=10)
    assert list(side_by_side(lambda _: meet.wait() >= 0, range(8), at_once=4)) == [True] * 8


def test_gradients_are_recorded_as_where_it_is_called() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert all(product.requires_grad for product in side_by_side(lambda _: weight * 2, range(4), at_once=2))
    with torch.no_grad():
        assert not any(product.requires_grad for product in side_by_side(lambda _: weight * 2, range(4), at_once=2))


def test_an_error_is_raised_when_no_other_is_at_work() -> None:
    begun, ended = [], []

    def work(piece: int) -> None:
        if piece == 0:
            raise ValueError("no memory for piece 0")
        begun.append(piece)
        time.sleep(0.05)
        ended.append(piece)

    with pytest.raises(ValueError, match="piece 0"):
        list(side_by_side(work, range(100), at_once=2))
    assert sorted(begun) == sorted(ended)
    assert len(begun) <= 2 * AHEAD


def test_what_nobody_takes_is_not_computed() -> None:
    done: list[int] = []
    results = side_by_side(done.append, range(100), at_once=2)
    next(results)
    results.close()
    assert len(done) <= 2 * AHEAD


def test_a_model_with_a_dropout_of_its_own_takes_one_pass_at_a_time_in_training() -> None:
    """Threads would draw from one generator in no order, and gradient caching could not draw the same numbers again."""
    own = Encoder(tiny_model("gpt2", attn_pdrop=0.1), source_fingerprint="", precision="fp32")
    assert own.eval().chunks_at_once() == 4
    state = torch.get_rng_state()
    assert own.train().chunks_at_once() == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert tiny_encoder(dropout=0.3).train().chunks_at_once() == 4


def test_a_model_whose_passes_change_it_takes_one_at_a_time() -> None:
    """RWKV scales its weights in place as it is first read after training; longrope turns its frequencies with the length."""
    config = RwkvConfig(vocab_size=259, hidden_size=32, num_hidden_layers=6, attention_hidden_size=32, rescale_every=1)
    scaling = Encoder(AutoModelForCausalLM.from_config(config), source_fingerprint="", precision="fp32", packed=False)
    assert scaling.train().eval().chunks_at_once() == 1
    turning = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16, "factor": 32.0,
    }  # fmt: skip
    long = Encoder(tiny_model("llama", rope_parameters=turning), source_fingerprint="", precision="fp32")
    for length in (2, 24, 2):  # from one side of 16 to the other
        long.eval()
        assert long.chunks_at_once() == 1
        long.embed([np.arange(3, 3 + length)])


def test_gradient_checkpointing_takes_one_pass_at_a_time_in_training() -> None:
    """The backward pass computes again, when the numbers of the pass's own generator are gone."""
    encoder = tiny_encoder(dropout=0.3)
    encoder.causal_lm.gradient_checkpointing_enable()
    assert encoder.eval().chunks_at_once() == 4
    assert encoder.train().chunks_at_once() == 1


def test_one_chunk_is_computed_without_a_try_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether passes go side by side is tried by a pass of its own, which a single text shall not wait for."""
    encoder, tried = tiny_encoder(), []
    monkeypatch.setattr(Encoder, "_moves_what_is_shared", lambda self: bool(tried.append(self)))
    encoder.embed([np.arange(3, 9)])
    assert encoder.chunks_at_once(of=1) == 1
    assert not tried
    assert encoder.chunks_at_once(of=2) == 4
    assert tried


def test_a_dropout_that_is_turned_on_later_is_seen() -> None:
    encoder = Encoder(tiny_model("gpt2", attn_pdrop=0.0), source_fingerprint="", precision="fp32").train()
    assert encoder.chunks_at_once() == 4
    for part in encoder.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.1
    assert encoder.train().chunks_at_once() == 1


def test_threads_that_cannot_be_had_are_an_error_and_no_deadlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five workers, of which the third cannot start, as under a limit of processes."""
    started, start = [], threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        with pytest.raises(RuntimeError, match="can't start"):
            _pool.__wrapped__(5, 1)
    for thread in started[:2]:
        thread.join(10)
        assert not thread.is_alive()
    assert torch.get_num_threads() == 4
