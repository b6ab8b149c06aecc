"""Published numbers, shown beside ours: link prediction and question answering, as data with their source."""

import re
from dataclasses import dataclass

KALM = "Yu et al., KaLM, arXiv 2412.04948"
SOURCE = (
    f"Most rows, those of KaLM and of its unaligned base among them: {KALM}. C-LMKE with its authors' correction; mean rank of"
    " SimKGC from its released predictions; MoCoKGC, CoDEx-S and SimKGC on UMLS from their own papers."
)
QUESTION_SOURCE = f"{KALM}, Figure 6: WN18RR, accuracy in %; its scoring rule is not published."


@dataclass(frozen=True)
class PublishedLinks:
    """Hold a published row of filtered link prediction, mean of both directions; None where it was not reported."""

    system: str
    mr: float | None
    mrr: float | None
    hits_at_1: float | None
    hits_at_3: float | None
    hits_at_10: float | None


@dataclass(frozen=True)
class PublishedAnswers:
    """Hold a published accuracy in % of the four question tasks, (unaligned, aligned) each."""

    model: str
    head: tuple[float, float]
    tail: tuple[float, float]
    relation: tuple[float, float]
    classification: tuple[float, float]


WN18RR = (
    PublishedLinks("TransE", 2300, 0.243, 0.043, 0.441, 0.532),
    PublishedLinks("RotatE", 3340, 0.476, 0.428, 0.492, 0.571),
    PublishedLinks("NBFNet", 636, 0.551, 0.497, 0.573, 0.666),
    PublishedLinks("StAR", 51, 0.401, 0.243, 0.491, 0.709),
    PublishedLinks("C-LMKE (corrected)", 79, 0.619, 0.523, 0.671, 0.789),
    PublishedLinks("SimKGC (BERT-base, 2 encoders)", 196, 0.671, 0.585, 0.731, 0.817),
    PublishedLinks("Llama-2-7B, unaligned", 15969, 0.010, 0.004, 0.010, 0.020),
    PublishedLinks("KaLM, Llama-2-7B", 22, 0.596, 0.497, 0.706, 0.856),
    PublishedLinks("KaLM, Llama-3-8B", 28, 0.613, 0.502, 0.728, 0.865),
    PublishedLinks("KaLM, Mistral-7B", 25, 0.634, 0.526, 0.743, 0.872),
    PublishedLinks("MoCoKGC", None, 0.742, 0.665, 0.792, 0.881),
)
FB15K_237 = (
    PublishedLinks("TransE", 323, 0.279, 0.198, 0.376, 0.441),
    PublishedLinks("RotatE", 177, 0.338, 0.241, 0.375, 0.533),
    PublishedLinks("NBFNet", 114, 0.415, 0.321, 0.454, 0.599),
    PublishedLinks("StAR", 117, 0.296, 0.205, 0.322, 0.482),
    PublishedLinks("C-LMKE (corrected)", 141, 0.306, 0.218, 0.331, 0.484),
    PublishedLinks("SimKGC (BERT-base, 2 encoders)", 140, 0.333, 0.246, 0.362, 0.510),
    PublishedLinks("Llama-2-7B, unaligned", 5359, 0.006, 0.002, 0.004, 0.012),
    PublishedLinks("KaLM, Llama-2-7B", 114, 0.305, 0.227, 0.348, 0.511),
    PublishedLinks("KaLM, Llama-3-8B", 125, 0.327, 0.241, 0.366, 0.522),
    PublishedLinks("KaLM, Mistral-7B", 117, 0.341, 0.252, 0.371, 0.536),
    PublishedLinks("MoCoKGC", None, 0.391, 0.296, 0.431, 0.580),
)
PUBLISHED_LINKS = {
    "WN18RR": WN18RR,
    "FB15k-237": FB15K_237,
    "CoDEx-S": (PublishedLinks("ComplEx with relation prediction", None, 0.473, 0.375, None, 0.663),),
    "UMLS": (PublishedLinks("SimKGC", None, None, None, None, 0.944),),
}
PUBLISHED_ANSWERS = (
    PublishedAnswers("Llama-2-7B", (7.8, 16.8), (11.6, 28.9), (3.7, 14.5), (55.9, 61.4)),
    PublishedAnswers("Llama-3-8B", (11.9, 17.7), (14.5, 29.3), (3.1, 15.8), (53.6, 69.8)),
    PublishedAnswers("Mistral-7B", (11.6, 19.0), (17.9, 31.2), (29.0, 37.5), (54.2, 66.7)),
)


def published_graph(name: str) -> str | None:
    """Return the key in PUBLISHED_LINKS of a graph, however its name is written, or None where nothing is known of it."""
    plain = _plain(name)
    return next((graph for graph in PUBLISHED_LINKS if _plain(graph) == plain), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
