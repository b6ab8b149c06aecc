"""List where well-known graphs are published: pinned commits, and the size and digest of every file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pykalm.graph.convert import convert_codex, convert_freebase, convert_named, convert_wordnet

BASE_URL = "https://raw.githubusercontent.com"

_CONVE = "TimDettmers/ConvE/f3c0eb286025410fa5b4c04696c918264163d0ca"
_KG_BERT = "yao8839836/kg-bert/0b8f625108efcb9b43603b6840f2548ff3d3c973/data"
_CODEX = "tsafavi/codex/3132e426c2a6b643b70bad679905a3a6270be440/data"


@dataclass(frozen=True)
class Source:
    """Name one published file: its path below BASE_URL, its size in bytes (None: unknown) and its digest.

    A "git:" digest is the id that the pinned commit itself gives to the file; it stands where the file is
    too large to have been measured when this list was written.
    """

    path: str
    size: int | None
    digest: str

    @property
    def file_name(self) -> str:
        """Return the last part of the path."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class NamedGraph:
    """Describe a graph that goes by a name; without sources it is bundled with the package."""

    name: str
    summary: str
    sources: tuple[Source, ...] = ()
    convert: Callable[[Path, Path], None] | None = None


_GRAPHS = (
    NamedGraph("world", "countries, capitals, borders, languages, currencies, regions (bundled)"),
    NamedGraph(
        "wn18rr",
        "WordNet: 40,943 synsets with lemma and gloss, 11 relations",
        (
            Source(
                f"{_CONVE}/WN18RR.tar.gz",
                892861,
                "sha256:1eb9152f804c140d163462c0d49f65e5a0b30ab5fbb375c5e3353c11a6249060",
            ),
            Source(
                f"{_KG_BERT}/WN18RR/entity2text.txt",
                4086439,
                "sha256:8f5c6f11753dafa879917b9bdf73d398ceb3bd4bed8d5553177e1e0f2c37521f",
            ),
            Source(
                f"{_KG_BERT}/WN18RR/relation2text.txt",
                370,
                "sha256:91b1de5585d686ed31498d50f1c4eed44ba9486dffbbcc0c28927ac884184918",
            ),
        ),
        convert_wordnet,
    ),
    NamedGraph(
        "fb15k-237",
        "Freebase: 14,541 entities with name and description, 237 relations",
        (
            Source(
                f"{_CONVE}/FB15k-237.tar.gz",
                3678603,
                "sha256:311df7930f842a02979eaa7a802484a6afe62303c07f915f1e6edbc30cbe05e8",
            ),
            Source(
                f"{_KG_BERT}/FB15k-237/entity2text.txt",
                392383,
                "sha256:16beedcfad3d32696e8b0b98cfa0f5eeb144f5142225f227a64fd9ce37447da5",
            ),
            Source(
                f"{_KG_BERT}/FB15k-237/entity2textlong.txt",
                None,
                "git:3f03705213f3886a6e45ec6131946ef77a5a0ed5",
            ),
            Source(
                f"{_KG_BERT}/FB15k-237/relation2text.txt",
                29130,
                "sha256:4bf7cb6ea0ac09b17ad210889f723be5e079669f6ae5d507787e1320bbaa0f72",
            ),
        ),
        convert_freebase,
    ),
    NamedGraph(
        "codex-s",
        "Wikidata: 2,034 entities with label and description, 42 relations, hard negatives",
        (
            Source(
                f"{_CODEX}/triples/codex-s/train.txt",
                615428,
                "sha256:64f93b7f314f3936a6f65739721429db3f6a7c8f5a1e1104ec3bb544f7434f59",
            ),
            Source(
                f"{_CODEX}/triples/codex-s/valid.txt",
                34323,
                "sha256:3831c0e57daef03c3a18cdd1a72e370b496f696c5218883d35c7d2ab8a6a772c",
            ),
            Source(
                f"{_CODEX}/triples/codex-s/test.txt",
                34252,
                "sha256:27127fcb34688c4778e88a39ef3c9b540807da846021e9d9685660ac1838aca1",
            ),
            Source(
                f"{_CODEX}/triples/codex-s/valid_negatives.txt",
                32801,
                "sha256:c1d84860d6ee786419f1f118d0e9479c6614283b3e267afc158734389036901f",
            ),
            Source(
                f"{_CODEX}/triples/codex-s/test_negatives.txt",
                32627,
                "sha256:d3fb32c41f3be26d09484ace571965806f1ade0ca712551b0de684c283cdbb22",
            ),
            Source(
                f"{_CODEX}/relations/en/relations.json",
                10698,
                "sha256:2b467fab26430a0500e5fe82cdb9b3c4fbcfda01827ff3bfa833dc5470ad92f7",
            ),
            Source(
                f"{_CODEX}/entities/en/entities.json",
                None,
                "git:4d16d7251779deae3b264da1a43a73ed944f4932",
            ),
        ),
        convert_codex,
    ),
    NamedGraph(
        "umls",
        "medical semantic network: 135 entities and 46 relations, names only",
        (
            Source(
                f"{_CONVE}/umls.tar.gz",
                35648,
                "sha256:26223aa91f0ec8db2324e0f489b9a4425e04d1d0df72ce5cfd62af4b91aee6fd",
            ),
            Source(
                f"{_KG_BERT}/umls/entity2text.txt",
                5033,
                "sha256:c6438aafd894917cefe73ea75fc20743d18f4226ebc85a2f43758ff3f77330b9",
            ),
            Source(
                f"{_KG_BERT}/umls/relation2text.txt",
                1062,
                "sha256:f5c5eddf696c52fc3c435ac031a4a0b06e00cc09116613db6a835d02d610123c",
            ),
        ),
        convert_named,
    ),
)

CATALOGUE: dict[str, NamedGraph] = {graph.name: graph for graph in _GRAPHS}
