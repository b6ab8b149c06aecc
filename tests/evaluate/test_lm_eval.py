"""Against lm-eval itself, where it is installed: perplexity on the same text and window, and MMLU from local files."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from pykalm.errors import KalmError, UsageError
from pykalm.evaluate.corpora import Corpus, Document, detokenized, read_corpus
from pykalm.evaluate.harness import run_tasks
from pykalm.evaluate.perplexity import measure_perplexity
from pykalm.model.encoder import Encoder
from pykalm.model.load import load_language_model
from tests.laws.common import tiny_encoder
from tests.tiny_models import tiny_tokenizer

pytestmark = pytest.mark.slow  # importing it takes as long as all the other tests of a folder
lm_eval = pytest.importorskip("lm_eval")

PAGES = [" = A Page = \n \n It cost 5 @,@ 000 ; he paid , he said . \n " * 6, " = Another = \n \n The ' end ' . "]


def word_and_byte_perplexity(encoder: Encoder, tokenizer: Any, pages: list[str], window: int) -> tuple[float, float]:
    """Return lm-eval's own two numbers, with its detokenizer and counts, of pages read in windows of its own."""
    from datasets import Dataset
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    def documents(**_: Any) -> dict[str, Any]:
        return {"test": Dataset.from_list([{"page": page} for page in pages])}

    task = {
        "task": "pages", "custom_dataset": documents, "test_split": "test", "output_type": "loglikelihood_rolling",
        "doc_to_text": "", "doc_to_target": wikitext_detokenizer, "process_results": process_results,
        "metric_list": [{"metric": f"{name}_perplexity"} for name in ("word", "byte")] + [{"metric": "bits_per_byte"}],
    }  # fmt: skip
    model = HFLM(
        pretrained=encoder.causal_lm, tokenizer=tokenizer, batch_size=3, max_length=window, softmax_dtype="float32",
        mixed_precision_dtype="bfloat16" if encoder.compute_dtype == torch.bfloat16 else None,
    )  # fmt: skip
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)["results"]["pages"]
    return found["word_perplexity,none"], found["byte_perplexity,none"]


@pytest.mark.parametrize("window", [16, 61, 512])
def test_perplexity_is_that_of_lm_eval_on_the_same_text_and_window(window: int) -> None:
    """Six digits in float32, where four are wanted."""
    encoder, tokenizer = tiny_encoder(), tiny_tokenizer()
    corpus = Corpus("pages", tuple(Document(page, is_wikitext=True) for page in PAGES))
    found = measure_perplexity(encoder, tokenizer, corpus, window=window).to_dict()
    word, byte = word_and_byte_perplexity(encoder, tokenizer, PAGES, window)
    assert found["word"] == pytest.approx(word, rel=1e-4)  # e to some 30 a word: an error of 3e-6 in the likelihood
    assert found["byte"] == pytest.approx(byte, rel=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(256, 256), (256, 128)])
def test_perplexity_of_a_real_model_is_that_of_lm_eval(
    data_folder: Path, monkeypatch: pytest.MonkeyPatch, window: int, stride: int
) -> None:
    """SmolLM2-135M on the beginning of WikiText-2, float32: equal to four digits, and unequal with another stride."""
    monkeypatch.setenv("KALM_DATA", str(data_folder))
    base = load_language_model("smollm2-135m", dtype=torch.float32)
    encoder = Encoder(base.model, source_fingerprint=base.fingerprint, precision="fp32")
    page = read_corpus("wikitext2").documents[0].cut(900, lambda text: len(base.tokenizer(text)["input_ids"]))
    corpus = Corpus("page", (page,))
    found = measure_perplexity(encoder, base.tokenizer, corpus, window=window, stride=stride).to_dict()
    word, byte = word_and_byte_perplexity(encoder, base.tokenizer, [page.original], window)
    same = pytest.approx(word, rel=5e-5), pytest.approx(byte, rel=5e-5)
    assert ((found["word"], found["byte"]) == same) is (stride == window)


def test_wikitext_is_detokenized_as_lm_eval_does(data_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer

    monkeypatch.setenv("KALM_DATA", str(data_folder))
    for name in ("wikitext2", "wikitext103"):
        for document in read_corpus(name).documents:
            page = {"page": document.original}
            assert detokenized(document.original) == wikitext_detokenizer(page)
            counts = process_results(page, [0.0])
            assert (document.num_words, document.num_bytes) == (
                counts["word_perplexity"][1],
                counts["byte_perplexity"][1],
            )


@pytest.fixture
def mmlu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write two subjects of MMLU; the right answer is always B."""
    for subject, count in (("anatomy", 4), ("world_religions", 7)):
        for split, number in (("dev", 5), ("test", count)):
            path = tmp_path / "MMLU" / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8", newline="") as file:
                csv.writer(file).writerows(
                    [f"q {i}, of {subject}?", "no", "yes", "no", "no", "B"] for i in range(number)
                )
    monkeypatch.setenv("KALM_DATA", str(tmp_path))
    return tmp_path


class Prefers:
    """Stand before a model's output head and make one token the likeliest."""

    def __init__(self, token: int) -> None:
        self.token = token
        self.read: list[torch.Tensor] = []

    def __call__(self, module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
        self.read.append(arguments[0] if arguments else keywords["input_ids"])
        output.logits[..., self.token] += 1000
        return output


@pytest.mark.parametrize(("letter", "accuracy"), [("B", 1.0), ("C", 0.0)])
def test_mmlu_from_local_files_asks_what_lm_eval_asks(mmlu: Path, letter: str, accuracy: float) -> None:
    """A model that always writes B is always right; questions stand behind five others of dev, in lm-eval's wording."""
    tokenizer = tiny_tokenizer()
    encoder = tiny_encoder()
    hook = Prefers(tokenizer(" " + letter)["input_ids"][-1])
    handle = encoder.causal_lm.register_forward_hook(hook, with_kwargs=True)
    try:
        found = run_tasks(encoder, tokenizer, ["mmlu", "mmlu_anatomy", "mmlu_humanities"], limit=5, batch_size=2)
    finally:
        handle.remove()
    assert {name: task.metrics["acc"] for name, task in found.items()} == dict.fromkeys(found, accuracy)
    assert {name: task.num_questions for name, task in found.items()} == {
        "mmlu": 9, "mmlu_anatomy": 4, "mmlu_humanities": 5,
    }  # fmt: skip
    assert found["mmlu"].shots == 5
    assert set(found["mmlu"].parts) == {"mmlu_anatomy", "mmlu_world_religions"}
    assert "acc_stderr" in found["mmlu"].metrics
    asked = tokenizer.decode(hook.read[0][0])  # the longest come first; a letter is a space and a byte here
    assert asked.split("\n")[0].endswith("questions (with answers) about world religions.")
    assert asked.count("A. no\nB. yes\nC. no\nD. no\nAnswer: B\n\n") == 5
    assert asked.endswith("q 0, of world_religions?\nA. no\nB. yes\nC. no\nD. no\nAnswer: ")


def test_a_task_whose_data_cannot_be_had_and_an_unknown_task_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_DATA", "")
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no hub here.\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(KalmError, match=r"cannot load the data of arc_easy: no hub here\. Connect"):
        run_tasks(tiny_encoder(), tiny_tokenizer(), ["arc_easy"])
    with pytest.raises(UsageError, match=r"no task 'arc_eazy'.*'arc_easy'"):
        run_tasks(tiny_encoder(), tiny_tokenizer(), ["arc_eazy"])


def test_the_tokenizer_and_random_numbers_are_left_alone(mmlu: Path) -> None:
    tokenizer, encoder = tiny_tokenizer(), tiny_encoder().train()
    tokenizer.pad_token = None
    torch.manual_seed(5)
    expected = torch.random.get_rng_state()
    run_tasks(encoder, tokenizer, ["mmlu_anatomy"], limit=1, shots=0)
    assert tokenizer.pad_token is None
    assert torch.equal(torch.random.get_rng_state(), expected)
    assert encoder.training
