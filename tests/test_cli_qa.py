"""Question answering through the command line, on a tiny graph and a tiny random model."""

import json
from pathlib import Path

import pytest

import pykalm
from pykalm import cli
from tests.ranks import run_ranks
from tests.test_launched import kalm
from tests.tiny_models import save_tiny_model

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Chad": "N'Djamena", "Peru": "Lima", "Fiji": "Suva"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train one step on countries and capitals."""
    folder = tmp_path_factory.mktemp("qa")
    triples = [f"{country}\tcapital\t{city}" for country, city in CAPITALS.items()]
    for split, rows in (("train", triples[:4]), ("valid", triples[4:5]), ("test", triples[5:])):
        (folder / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "relations.tsv").write_text("capital\thas the capital\tis the capital of\n", encoding="utf-8")
    model = save_tiny_model(folder / "model")
    settings = ["training.max_steps=1", "training.batch_size=4", "training.device=cpu"]
    options = [part for setting in settings for part in ("--set", setting)]
    out = folder / "run"
    assert cli.main(["train", "--graph", str(folder), "--model", str(model), "--out", str(out), *options]) == 0
    return out


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "qa"),
        (
            ["--descriptions", "--shots", "1", "--constrained", "--ranked", "3"],
            "qa.descriptions.1-shot.constrained.ranked-3",
        ),
        (["--split", "valid", "--limit", "1", "--baseline"], "qa.valid.1-triples.baseline"),
    ],
)
def test_answers_are_measured_as_json_and_in_files(
    run: Path, options: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["evaluate", "qa", str(run), "--json", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert set(printed["tasks"]) == {"tail", "head", "relation", "classification"}
    assert printed["aligned"] == ("--baseline" not in options)
    assert printed["descriptions"] == ("--descriptions" in options)
    assert len((run / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == 5
    assert cli.main(["evaluate", "qa", str(run), "--json", *options]) == 0
    assert json.loads(capsys.readouterr().out) == printed  # nothing is asked again


def test_answers_are_measured_as_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "qa", str(run), "--tasks", "tail,classification", "--max-new-tokens", "2"]) == 0
    printed = capsys.readouterr().out
    for text in ("tail", "classification", "aligned", "most-frequent", "copy-description", "majority", "by link score"):
        assert text in printed
    assert "relation " not in printed.split("questions")[1]


@pytest.mark.parametrize("wrong", [["--tasks", "tails"], ["--wording", "mine"], ["--shots", "9"], ["--limit", "0"]])
def test_wrong_usage_is_refused(run: Path, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "qa", str(run), *wrong]) == 2
    assert capsys.readouterr().err.strip()


def test_answers_that_cannot_be_saved_are_printed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "results" / "qa.3-tokens.json" / "in the way").mkdir(parents=True)
    assert cli.main(["evaluate", "qa", str(run), "--max-new-tokens", "3", "--tasks", "tail", "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out)["tasks"]["tail"]["num_questions"] == 1
    assert "not saved" in printed.err


@pytest.mark.parametrize(
    "question", [{"head": "Fiji"}, {"tail": "Suva"}, {"head": "Suva", "relation": "is the capital of"}]
)
def test_the_likeliest_answers_to_a_question(run: Path, question: dict[str, str]) -> None:
    answers = pykalm.rank_answers(pykalm.load_run(run), **{"relation": "capital", "k": 12, **question})
    assert sorted(answer.name for answer in answers) == sorted([*CAPITALS, *CAPITALS.values()])
    assert [answer.rank for answer in answers] == list(range(1, 13))
    likelihoods = [answer.log_likelihood for answer in answers]
    assert likelihoods == sorted(likelihoods, reverse=True)
    assert answers[0].entities == (answers[0].name,)


def test_a_question_needs_one_side(run: Path) -> None:
    with pytest.raises(pykalm.KalmError, match="one of head and tail"):
        pykalm.rank_answers(pykalm.load_run(run), relation="capital")


@pytest.mark.slow
def test_two_processes_answer_as_one(run: Path) -> None:
    arguments = ["evaluate", "qa", str(run), "--json", "--split", "train", "--ranked", "2"]
    kept = run / "results" / "qa.ranked-2.train.jsonl"
    found = []
    for count in (1, 2):
        kept.unlink(missing_ok=True)
        (code, out, _), *others = [kalm(arguments)] if count == 1 else run_ranks(2, kalm, arguments)
        assert code == 0
        assert all(other == (0, "", "") for other in others)
        found.append((json.loads(out), kept.read_text(encoding="utf-8")))
    assert found[0] == found[1]


@pytest.mark.slow
def test_parts_of_weights_cannot_answer(run: Path) -> None:
    sharded = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    codes = [
        code for code, _, _ in run_ranks(2, kalm, ["evaluate", "qa", str(run), "--limit", "1"], environment=sharded)
    ]
    assert codes == [2, 2]
