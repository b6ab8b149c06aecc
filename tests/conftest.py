"""What all tests share: no network, few threads, and the benchmark data where it lies beside the repository."""

import os
from pathlib import Path

import pytest

# Set before any library is imported: tests take models and graphs from this machine only.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # tiny models gain nothing from more, and wait for each other on a busy machine

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the folder of this checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of the benchmark graphs, from $KALM_DATA or beside the repository; else skip."""
    places = [*os.environ.get("KALM_DATA", "").split(os.pathsep), str(REPOSITORY.parent / "shared" / "data")]
    for place in places:
        if place and (Path(place) / "UMLS" / "train.tsv").is_file():
            return Path(place).resolve()
    pytest.skip("the benchmark graphs are not here: set KALM_DATA to the folder that holds UMLS, WN18RR, ...")
