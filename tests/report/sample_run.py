"""Run folders as training and measuring leave them, with made-up but likely numbers.

`python -m tests.report.sample_run OUT` writes some of them to be looked at.
"""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pykalm.config import load_config
from pykalm.graph.catalogue import load_graph
from pykalm.graph.graph import KnowledgeGraph

HOSTILE = (
    "<script>alert(1)</script>",
    "</svg></style><img src=x onerror=alert(2)>",
    "\"quoted\" & 'quoted' $x_{1}$ {{ 7 * 7 }}",
    "日本国, مصر, Ελλάδα, 🇨🇭 and a name that goes on and on " + "x" * 160,
    "tab\there --> and <!-- there \x00\x1b",
)
METRICS = ("mr", "mrr", "hits_at_1", "hits_at_3", "hits_at_10")
ABOUT = {"graph": "world", "split": "test", "model": "smollm2-135m", "template": "prefix-sharing", "descriptions": False,
         "max_entity_tokens": 50, "seed": 0}  # fmt: skip
SENTENCES = (
    "The river rises in the hills and reaches the sea after two hundred miles.",
    "She published her first novel at the age of nineteen.",
    "The match was played in heavy rain before a small crowd.",
    "Its leaves are narrow, and the flowers open in late summer.",
    "The song spent eleven weeks on the charts.",
    "In the spring the regiment marched north along the coast.",
    "The bridge was closed for repairs until the following year.",
    "Critics praised the lighting but not the script.",
    "A second survey counted fewer than forty pairs.",
    "The station opened with two platforms and a goods yard.",
    "He returned to the capital and resumed his studies of law.",
    "The storm weakened as it moved over colder water.",
)


def write_bare_run(folder: Path) -> Path:
    """Write a run that has only begun: its settings, nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(load_config(None, [], graph="world").to_yaml(), encoding="utf-8")
    return folder


def write_full_run(folder: Path, *, is_hostile: bool = False, graph_name: str = "world") -> Path:
    """Write a run of which everything has been measured; hostile: names hold HTML, formulas and every script."""
    graph, generator = load_graph("world"), np.random.default_rng(0)
    names = [*HOSTILE, *graph.entity_names[len(HOSTILE) :]] if is_hostile else graph.entity_names
    relations = [*HOSTILE, *graph.relation_texts[len(HOSTILE) :]] if is_hostile else graph.relation_texts
    overrides = [
        "training.epochs=4",
        "training.batch_size=64",
        "training.learning_rate=2e-3",
        "text.descriptions=false",
    ]
    write_bare_run(folder)
    (folder / "config.yaml").write_text(load_config(None, overrides, graph=graph_name).to_yaml(), encoding="utf-8")
    write_json(folder / "adapter" / "alignment.json", alignment(graph))
    write_lines(folder / "metrics.jsonl", steps(generator))
    results = folder / "results"
    for aligned, suffix in ((False, ".baseline"), (True, "")):
        about = {**ABOUT, "graph": graph_name, "aligned": aligned}
        write_links(results, suffix, about, graph, relations, generator)
        for setting, gain in (("", 0.0), (".descriptions.3-shot", 0.14)):
            questions = answers(graph, names, relations, generator, right=(0.07, 0.46)[aligned] + gain)
            write_json(results / f"qa{setting}{suffix}.json", {**about, **question_result(questions, aligned)})
            write_lines(results / f"qa{setting}{suffix}.jsonl", questions)
        write_json(results / f"language{suffix}.json", {**about, **language(aligned)})
        write_json(
            results / f"geometry{suffix}.json", {**about, **geometry(graph, names, relations, generator, aligned)}
        )
    write_json(results / "rerank.json", {**ABOUT, **rerank()})
    return folder


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2), encoding="utf-8")


def write_lines(path: Path, values: Sequence[object]) -> None:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")


def alignment(graph: KnowledgeGraph) -> dict[str, Any]:
    """Return what is saved beside the weights."""
    templates = {"name": "prefix-sharing", "entity": "{name}: {description}", "query": "[ {head}, {relation} ]",
                 "candidate": "[ {entity} ]", "completion": "[ {head}, {relation} ]", "answer": " {name}"}  # fmt: skip
    return {
        "format": 1, "temperature": 0.0384, "pooling": "last", "templates": templates, "model": "smollm2-135m",
        "model_fingerprint": "74f806419ead3d84949ee265c05f2141307dc0a63168189c420f898ab95b8a86",
        "tokenizer_fingerprint": "e7ec2dea49fbd0754250d8cad455c3669102a7b43ed16c5b5910b01f803a0534",
        "graph": "world", "graph_fingerprint": graph.fingerprint(), "step": 176, "valid_mrr": 0.565,
    }  # fmt: skip


def steps(generator: np.random.Generator, count: int = 176) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl of a training that goes well."""
    lines = []
    for step in range(1, count + 1):
        explicit = 1.6 + 3.9 * math.exp(-step / 38) + generator.normal(0, 0.09)
        implicit = 2.1 + 5.6 * math.exp(-step / 22) + generator.normal(0, 0.2)
        lines.append({
            "step": step, "num_steps": count, "epoch": step / 44, "loss": explicit + 0.01 * implicit, "explicit": explicit,
            "implicit": implicit, "kl": 0.05 + 0.2 * math.exp(-step / 30),
            "temperature": 0.05 - 0.012 * (1 - math.exp(-step / 60)), "learning_rate": 2e-3,
            "gradient_norm": 1.0, "examples_per_second": 31.0 + generator.normal(), "tokens_per_second": 480.0, "fill": 0.97,
            "seconds_left": 1.0, "valid_mrr": 0.57 * (1 - math.exp(-step / 45)) if step % 44 == 0 else None,
        })  # fmt: skip
    return lines


def metrics(ranks: np.ndarray) -> dict[str, Any]:
    """Return the metrics of ranks, as EVALUATION.md §1 defines them."""
    hits = {f"hits_at_{k}": float((ranks <= k).mean()) for k in (1, 3, 10)}
    return {"mr": float(ranks.mean()), "mrr": float((1 / ranks).mean()), **hits, "num_queries": len(ranks)}


def write_links(
    folder: Path, suffix: str, about: dict[str, Any], graph: KnowledgeGraph, relations: Sequence[str],
    generator: np.random.Generator,
) -> None:  # fmt: skip
    """Write links*.json and the ranks beside it, which agree with each other."""
    triples, spread = graph.triples("test"), 2.1 if about["aligned"] else 6.0
    skill = generator.uniform(0.3, 1.7, graph.num_relations)[triples[:, 1]] if about["aligned"] else 1.0
    drawn = {side: np.exp(generator.exponential(spread * skill / 2, len(triples)) * factor).clip(1, 1067).round()
             for side, factor in (("tail", 0.8), ("head", 1.2))}  # fmt: skip
    lines = ["head\trelation\ttail\tdirection\toptimistic\trealistic\tpessimistic\tnum_candidates"]
    for side, ranks in drawn.items():
        for (head, relation, tail), rank in zip(triples.tolist(), ranks, strict=True):
            ids = f"{graph.entity_ids[head]}\t{graph.relation_ids[relation]}\t{graph.entity_ids[tail]}"
            lines.append(f"{ids}\t{side}\t{rank:.0f}\t{rank:.1f}\t{rank:.0f}\t1067")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"links{suffix}.ranks.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def sides(rows: np.ndarray) -> dict[str, Any]:
        parts = {side: metrics(ranks[rows]) for side, ranks in drawn.items()}
        return {"mean": metrics(np.concatenate([ranks[rows] for ranks in drawn.values()])), **parts}

    by_relation = {
        graph.relation_ids[relation]: {
            "text": relations[relation], "num_triples": int((triples[:, 1] == relation).sum()),
            **sides(np.flatnonzero(triples[:, 1] == relation)),
        }
        for relation in np.unique(triples[:, 1]).tolist()
    }  # fmt: skip
    protocol = ("filtered by train, valid, test; all 1067 entities are candidates; both directions; realistic ranks; all 347"
                " triples of the split")  # fmt: skip
    whole = sides(np.arange(len(triples)))
    write_json(folder / f"links{suffix}.json", {**about, "protocol": protocol, **whole, "relations": by_relation})


def answers(
    graph: KnowledgeGraph,
    names: Sequence[str],
    relations: Sequence[str],
    generator: np.random.Generator,
    *,
    right: float,
) -> list[dict[str, Any]]:
    """Return the lines of qa*.jsonl; `right` is the share of tails that are answered."""
    lines = []
    triples = graph.triples("test")[:120]
    every_relation = " | ".join(relations)
    for task, factor in (("tail", 1.0), ("head", 0.55), ("relation", 0.9), ("classification", 1.0)):
        for head, relation, tail in triples.tolist():
            prompt, gold, wrong = asked(task, names[head], relations[relation], names[tail], every_relation)
            wrong = wrong or names[(tail if task == "tail" else head) - 1]
            chance = 0.5 + right / 3 if task == "classification" else right * factor
            is_right = bool(generator.random() < chance)
            lines.append({
                "task": task, "head": graph.entity_ids[head], "relation": graph.relation_ids[relation],
                "tail": graph.entity_ids[tail], "direction": task if task in ("tail", "head") else None, "prompt": prompt,
                "gold": gold, "valid": [gold, *([names[(tail + 7) % len(names)]] if task == "tail" else [])],
                "answer": gold if is_right else wrong, "exact": is_right, "contains": is_right, "any_valid": is_right,
                **({"source": "random"} if task == "classification" else {}),
            })  # fmt: skip
    return lines


def asked(task: str, head: str, relation: str, tail: str, every_relation: str) -> tuple[str, str, str]:
    """Return a prompt, its right answer and a wrong one, which is empty where any other entity is."""
    complete = "Given the head entity and relation, write a tail entity that completes the triple:"
    choose = "Please choose your answer from:"
    return {
        "tail": (f"{complete} {head}, {relation}", tail, ""),
        "head": (f"{complete} {tail}, inverse of {relation}", head, ""),
        "relation": (
            f"What is the relation between {head} and {tail}? {choose} {every_relation}.",
            relation,
            "is near",
        ),
        "classification": (
            f'Is this true: {head} {relation} {tail}? {choose} "Yes, this is true" or "No, this is not true".',
            "Yes, this is true",
            "No, this is not true",
        ),
    }[task]


def question_result(lines: Sequence[dict[str, Any]], aligned: bool) -> dict[str, Any]:
    """Return what qa*.json says of these answers."""
    tasks = {}
    for task in ("tail", "head", "relation", "classification"):
        own = [line for line in lines if line["task"] == task]
        share = sum(line["any_valid"] for line in own) / len(own)
        few = {"exact": 0.05, "contains": 0.06, "any_valid": 0.11}
        baselines = {"most-frequent": few} if task != "classification" else {"majority": dict.fromkeys(few, 0.5)}
        if task in ("tail", "head"):
            baselines["copy-description"] = {"exact": 0.02, "contains": 0.09, "any_valid": 0.13}
        tasks[task] = {"num_questions": len(own), "exact": share * 0.8, "contains": share * 0.9, "any_valid": share,
                       "baselines": baselines}  # fmt: skip
    tasks["classification"]["by_score"] = {"random": {"accuracy": 0.91, "num_questions": 120}}
    tasks["tail"]["ranked"] = {"k": 5, "num_questions": 120, "hits_at_1": 0.4, "hits_at_5": 0.7}
    return {
        "protocol": "greedy, at most 32 tokens, stops at the end of text or a line",
        "tasks": tasks,
        "examples": lines[:3],
    }


def language(aligned: bool) -> dict[str, Any]:
    """Return language*.json."""
    factor = 1.043 if aligned else 1.0
    perplexity = {"word": 31.62 * factor, "token": 17.04 * factor**0.8, "byte": 1.908 * factor**0.2, "window": 2048,
                  "stride": 512, "num_words": 245569, "num_tokens": 334212}  # fmt: skip
    tasks = {"mmlu": {"acc": 0.267 if aligned else 0.271, "stderr": 0.0112, "num_questions": 1140},
             "arc_easy": {"acc": 0.498, "stderr": 0.01, "num_questions": 2376}}  # fmt: skip
    return {"protocol": "sliding window over the test text", "perplexity": {"wikitext2": perplexity}, "lm_eval": tasks}


def geometry(
    graph: KnowledgeGraph, names: Sequence[str], relations: Sequence[str], generator: np.random.Generator, aligned: bool
) -> dict[str, Any]:
    """Return geometry*.json."""
    groups = {}
    for name, number in (("queries", 694), ("candidates", 1067), ("sentences", 1000)):
        decay = (0.9 if aligned and name != "sentences" else 1.7) + 0.1 * len(name) / 10
        shares = np.arange(1, 577) ** -decay
        shares /= shares.sum()
        groups[name] = {
            "num_vectors": number, "alignment": (0.71 if aligned else 0.42) if name == "queries" else None,
            "uniformity": -3.1 if aligned else -0.6, "mean_cosine": 0.08 if aligned else 0.83,
            "top_eigenvalue_share": float(shares[0]), "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
            "spectrum": shares.tolist(),
        }  # fmt: skip
    numbers, limit = [1, 4, 16, 64, 256, 1066], -7.1 if aligned else -1.62
    triples = graph.triples("test")[::15][:24]
    count = len(triples)
    base = 0.12 if aligned else 0.83
    cosines = (base + generator.normal(0, 0.06, (count, count)) + (0.62 if aligned else 0.05) * np.eye(count)).clip(
        -1, 1
    )
    among = np.clip((0.8 if not aligned else 0.6) + generator.normal(0, 0.05, (len(SENTENCES),) * 2), -1, 1)
    np.fill_diagonal(among, 1.0)
    return {
        "protocol": "a sample by seed", "groups": groups,
        "theorem_1": {"num_negatives": numbers, "normalised_loss": [limit + 2.4 / number**0.55 for number in numbers],
                      "limit": limit, "temperature": 0.0384 if aligned else 0.05},
        "similarity": {
            "triples": {"queries": [f"{names[head]} · {relations[relation]}" for head, relation, _ in triples.tolist()],
                        "tails": [names[tail] for tail in triples[:, 2].tolist()], "matrix": cosines.round(4).tolist()},
            "sentences": {"labels": list(SENTENCES), "matrix": among.round(4).tolist()},
        },
    }  # fmt: skip


def rerank() -> dict[str, Any]:
    """Return rerank.json."""
    plain = {"mr": 7.0, "mrr": 0.538, "hits_at_1": 0.392, "hits_at_3": 0.612, "hits_at_10": 0.869}
    gains = {"mrr": 0.021, "hits_at_1": 0.029, "hits_at_3": 0.012, "hits_at_10": 0.0}
    return {
        "k": 10, "weight": 0.3, "valid": {"mrr": 0.57}, "plain": plain, "protocol": "paired bootstrap of 1,000 draws",
        "reranked": {name: plain[name] + gains.get(name, -0.1) for name in METRICS},
        "difference": {name: {"mean": gain, "low": gain - 0.014, "high": gain + 0.013} for name, gain in gains.items()},
    }  # fmt: skip


if __name__ == "__main__":
    out = Path(sys.argv[1])
    write_full_run(out / "full")
    write_full_run(out / "hostile", is_hostile=True)
    write_full_run(out / "wn18rr", graph_name="wn18rr")
    write_bare_run(out / "bare")
