"""The base model's own texts: drawn from it as it is, by seed, before there is an adapter; kept whole or refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, RecurrentGemmaConfig, RwkvConfig

from pykalm import api
from pykalm.errors import ModelError, RunError
from pykalm.learn.losses import kl_sum
from pykalm.model import own_texts
from pykalm.model.own_texts import OwnTexts, first_token, write_own_texts
from pykalm.model.side_by_side import side_by_side
from tests.laws.common import tiny_graph, torch_threads
from tests.laws.test_law_08_save_and_resume import SETTINGS
from tests.tiny_models import TOKENIZER_SIZE, save_tiny_model, tiny_model, tiny_tokenizer

HELD = {**SETTINGS, "objective.kl_weight": 1.0}


def same(first: OwnTexts, second: OwnTexts) -> bool:
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in ("tokens", "likely", "log_p"))


def test_texts_are_drawn_by_seed_and_leave_the_random_numbers_and_the_model_alone() -> None:
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE).train()
    state = torch.get_rng_state()
    first, again, other = (write_own_texts(model, 1, seed=seed, num_texts=5, length=9) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert same(first, again)
    assert not np.array_equal(first.tokens, other.tokens)
    assert first.tokens.shape == (5, 9)
    assert (first.tokens[:, 0] == 1).all()
    assert first.likely.shape == (5, 9, 128)
    assert first.log_p.shape == (5, 9, 129)


def recurrent_model(family: str) -> Any:
    """Return a tiny model of a family that reads otherwise from its cache than all at once, in weights that are no noise."""
    torch.manual_seed(0)
    if family == "rwkv":
        config: Any = RwkvConfig(
            vocab_size=200, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=64
        )
    else:
        config = RecurrentGemmaConfig(
            num_hidden_layers=2, vocab_size=200, hidden_size=32, intermediate_size=64, num_attention_heads=4, lru_width=32,
            attention_window_size=32, head_dim=8, num_key_value_heads=1, block_types=("recurrent", "attention"),
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "rwkv", "recurrent_gemma"])
def test_what_is_kept_of_a_token_is_what_the_model_says_of_the_text_up_to_it(family: str) -> None:
    """As it reads the whole text in training; and so it is however many threads write."""
    known = family in ("llama", "gpt2")
    model = tiny_model(family, vocab_size=TOKENIZER_SIZE).eval() if known else recurrent_model(family)
    for threads in (1, 4):
        with torch_threads(threads):
            check_that_the_model_says_so(model)


def check_that_the_model_says_so(model: Any) -> None:
    texts = write_own_texts(model, 1, seed=0, num_texts=5, length=9, num_likely=7)
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(texts.tokens).long(), use_cache=False).logits.float()
    likely = torch.from_numpy(texts.likely).long()
    assert torch.equal(logits.topk(7, dim=-1).indices, likely)
    assert own_texts.lumped_log_p(logits, likely).numpy() == pytest.approx(texts.log_p, rel=2e-3, abs=2e-3)


def test_tokens_are_drawn_as_often_as_they_are_likely_and_those_of_probability_0_never() -> None:
    shares = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.19, 0.01, 0.0])
    found = (
        own_texts.drawn(shares.log().expand(20_000, -1), torch.Generator().manual_seed(0))
        .squeeze(1)
        .bincount(minlength=7)
        / 20_000
    )
    assert found[shares == 0].tolist() == [0, 0, 0]
    assert found.tolist() == pytest.approx(shares.tolist(), abs=0.012)  # three standard deviations of .5


@pytest.mark.parametrize("moves", [False, True])
def test_texts_are_the_same_however_many_threads_write(moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts side by side, or one after another where passes move what threads share."""
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    monkeypatch.setattr(own_texts, "moves_what_is_shared", lambda *_: moves)
    at_once: list[int] = []

    def counted(*given: Any, **options: Any) -> Any:
        at_once.append(options["at_once"])
        return side_by_side(*given, **options)

    monkeypatch.setattr(own_texts, "side_by_side", counted)
    written = []
    for number in (1, 2, 4):
        with torch_threads(number):
            written.append(write_own_texts(model, 1, seed=0, num_texts=6, length=5))
    assert at_once == ([1, 1, 1] if moves else [1, 2, 4])
    assert all(same(texts, written[0]) for texts in written)
    assert len(np.unique(written[0].tokens, axis=0)) > 1


def test_a_cache_that_the_modules_hold_is_written_from_by_one_thread() -> None:
    """Threads would write into each other's, by no error that one sees."""
    model = recurrent_model("recurrent_gemma")
    with torch_threads(4), own_texts._reading(model, 5) as at_once:
        assert at_once == 1
    with torch_threads(4), own_texts._reading(tiny_model("llama"), 5) as at_once:
        assert at_once == 4


def test_an_interrupt_ends_all_threads_at_their_next_token() -> None:
    told: list[int] = []

    def interrupt(done: int, _: int) -> None:
        told.append(done)
        if done >= 40:
            raise KeyboardInterrupt

    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    makers = model.generation_config
    with torch_threads(4), pytest.raises(KeyboardInterrupt):
        write_own_texts(model, 1, seed=0, num_texts=8, length=60, progress=interrupt)
    assert max(told) < 120, "of 952"
    assert model.generation_config is makers


def test_a_model_of_one_position_writes_first_tokens() -> None:
    assert write_own_texts(tiny_model("gpt2", n_positions=1), 1, seed=0, num_texts=2).tokens.tolist() == [[1], [1]]


def test_progress_is_told_of_every_token() -> None:
    told: list[tuple[int, int]] = []
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    write_own_texts(model, 1, seed=0, num_texts=5, length=4, progress=lambda *report: told.append(report))
    done = [count for count, _ in told]
    assert (done, done[-1], {total for _, total in told}) == (sorted(set(done)), 35, {35})


def test_a_makers_settings_for_generation_bend_nothing_and_are_put_back() -> None:
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    plain = write_own_texts(model, 1, seed=0, num_texts=5, length=9)
    makers = GenerationConfig(
        temperature=0.1, top_k=1, repetition_penalty=2.0, do_sample=True, eos_token_id=int(plain.tokens[0, 3])
    )
    model.generation_config = makers
    assert same(write_own_texts(model, 1, seed=0, num_texts=5, length=9), plain)
    assert model.generation_config is makers


def test_a_small_model_gets_texts_as_long_as_it_can_read_and_a_small_vocabulary_fewer_likely_tokens() -> None:
    model = tiny_model("llama", vocab_size=20, max_position_embeddings=6)
    texts = write_own_texts(model, 1, seed=0, num_texts=2)
    assert texts.tokens.shape == (2, 6)
    assert texts.likely.shape == (2, 6, 19)
    assert write_own_texts(model, 1, seed=0, num_texts=2, length=1).tokens.tolist() == [[1], [1]]


def test_texts_are_saved_whole_and_a_damaged_file_is_refused(tmp_path: Path) -> None:
    texts = write_own_texts(tiny_model("llama", vocab_size=TOKENIZER_SIZE), 1, seed=0, num_texts=2, length=4)
    texts.save(tmp_path / "own.npz")
    assert same(OwnTexts.load(tmp_path / "own.npz"), texts)
    (tmp_path / "own.npz").write_bytes((tmp_path / "own.npz").read_bytes()[:100])
    for file in (tmp_path / "own.npz", tmp_path / "none.npz"):
        with pytest.raises(RunError, match=r"wanted the base model's own texts.*Bring the file back, or train anew"):
            OwnTexts.load(file)


def test_a_tokenizer_that_begins_and_ends_nothing_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    assert first_token(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="wanted a tokenizer with a begin or end token"):
        first_token(tokenizer)


def test_a_resumed_training_without_its_texts_says_what_is_missing(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=HELD)
    (tmp_path / "run" / "own_texts.npz").unlink()
    with pytest.raises(RunError, match=r"own_texts\.npz"):
        api.train(tiny_graph(), out=tmp_path / "run", resume=True)


def test_training_that_is_held_stays_nearer_to_the_base_model(tmp_path: Path) -> None:
    """Of every weight, too: nothing but the kept distributions is left of the base then."""
    model = str(save_tiny_model(tmp_path / "model"))
    for kind in ("lora", "full"):
        kl = {}
        for weight in (1e-6, 50.0):
            settings = {**HELD, "objective.kl_weight": weight, "adapter.kind": kind, "training.max_steps": 12,
                        "training.directions": "together"}  # fmt: skip
            seen: list[float] = []
            api.train(tiny_graph(), out=tmp_path / f"{kind}-{weight}", model=model, settings=settings,
                      watch=lambda report, seen=seen: seen.append(report.kl))  # fmt: skip
            kl[weight] = seen[-1]
        assert 0 < kl[50.0] < 0.5 * kl[1e-6], (kind, kl)


def test_a_run_of_before_goes_on_without_and_is_not_passed_off_as_held(tmp_path: Path) -> None:
    """Settings that do not name β were those of a training without."""
    model = str(save_tiny_model(tmp_path / "model"))
    settings = {**SETTINGS, "objective.kl_weight": 0.0}
    api.train(tiny_graph(), out=tmp_path / "run", model=model, settings=settings)
    file = tmp_path / "run" / "config.yaml"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "kl_" not in line), encoding="utf-8")
    run = api.train(tiny_graph(), out=tmp_path / "run", resume=True)
    assert run.config.objective.kl_weight == 0


def test_texts_of_another_run_are_refused(tmp_path: Path) -> None:
    model = str(save_tiny_model(tmp_path / "model"))
    for name, seed in (("run", 0), ("other", 1)):
        api.train(tiny_graph(), out=tmp_path / name, model=model, settings={**HELD, "seed": seed})
    (tmp_path / "other" / "own_texts.npz").replace(tmp_path / "run" / "own_texts.npz")
    with pytest.raises(RunError, match="the base model's own texts has changed"):
        api.train(tiny_graph(), out=tmp_path / "run", resume=True)
    np.savez(tmp_path / "wrong.npz", tokens=np.zeros((2, 3)), likely=np.zeros((2, 3, 4)), log_p=np.zeros((2, 3, 4)))
    np.save(tmp_path / "wrong.npy", np.zeros(3))
    for file in ("wrong.npz", "wrong.npy"):
        with pytest.raises(RunError, match="wanted the base model's own texts"):
            OwnTexts.load(tmp_path / file)


def test_a_damaged_model_is_named(tmp_path: Path) -> None:
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    with torch.no_grad():
        model.get_output_embeddings().weight[3] = torch.nan
    with pytest.raises(ModelError, match="wanted probabilities of next tokens, found some that are no numbers"):
        write_own_texts(model, 1, seed=0, num_texts=2, length=4)


def test_tokens_that_a_model_never_says_are_no_trouble() -> None:
    """log 0 is −∞, which times 0 is no number."""
    logits = torch.zeros(1, 6, requires_grad=True)
    never = torch.tensor([[0.0, 0.0, *[-torch.inf] * 4]])
    likely, log_p = own_texts._distributions(lambda **_: SimpleNamespace(logits=never[None]), torch.zeros(1, 1), 4)
    found = kl_sum(logits + never, likely[0], log_p[0].half())
    found.backward()  # type: ignore[no-untyped-call]
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(logits.grad).all()
