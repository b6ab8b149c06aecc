"""Claims about `make gpu`: it refuses politely without a GPU, its settings are valid, its dry form goes the whole way."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from pykalm.config import load_config
from tests.tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def gpu(repository: Path) -> ModuleType:
    """Return scripts/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("gpu", repository / "scripts" / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_what_to_do(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "wanted an NVIDIA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["--graph", "fb15k-237", "--seed", "3"], ["--dry"]])
def test_the_settings_are_valid(gpu: ModuleType, arguments: list[str]) -> None:
    given = gpu.parse(arguments)
    settings = [f"{key}={yaml.safe_dump(value).splitlines()[0]}" for key, value in gpu.settings_of(given).items()]
    config = load_config(None, ["graph=world", *settings])
    assert config.training.device == ("cpu" if given.dry else "cuda")
    assert config.seed == given.seed


@pytest.mark.slow
def test_the_dry_form_appends_a_section_beside_the_run(gpu: ModuleType, tmp_path: Path, repository: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    before = (repository / "docs" / "results.md").read_text(encoding="utf-8")
    assert gpu.main(["--dry", "--model", str(model), "--out", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "results.md").read_text(encoding="utf-8")
    assert "world on CPU (dry" in text
    assert "3 test triples, both directions, all" in text
    assert "2 steps" in text
    assert (repository / "docs" / "results.md").read_text(encoding="utf-8") == before
