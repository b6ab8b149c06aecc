"""Claims about norms in one step: the numbers and gradients of the model's own, only where those are what is computed."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from pykalm.bench.plan import adapters_of_peft
from pykalm.config import Config
from pykalm.learn.footprint import peak_bytes
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.norms import OneStep, norms_in_one_step
from pykalm.model.run import build_encoder
from tests.tiny_models import tiny_model

WIDTH = 32


def norms_of(family: str, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    """Return the RMS norms of a frozen tiny model, with weights that are not all 1, after all that can be were taken."""
    model = tiny_model(family).to(dtype).requires_grad_(False)
    named = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    for number, module in enumerate(named):
        nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(number))  # type: ignore[arg-type]
    norms_in_one_step(model)
    return named


def gradient_of(norm: nn.Module, x: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    found = norm(x)
    return found.detach(), torch.autograd.grad(found, x, above)[0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "mamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_gradients_are_those_of_the_models_own(family: str, dtype: torch.dtype) -> None:
    """Float32 to 1e-6 of the largest; in bfloat16 all but a few numbers are the same bits, and the gradient rounds less."""
    taken, generator = norms_of(family, dtype), torch.Generator().manual_seed(0)
    assert taken
    for norm in taken:
        assert isinstance(norm, OneStep)
        width = len(norm.weight)
        x, above = (torch.randn(3, 50, width, generator=generator).to(dtype) for _ in range(2))
        x[0] *= 1e-3  # what is added to the mean square counts there
        found = gradient_of(norm, x, above)
        norm.give_back()
        assert not isinstance(norm, OneStep)
        wanted = gradient_of(norm, x, above)
        assert [part.dtype for part in found] == [part.dtype for part in wanted]
        if dtype == torch.bfloat16:
            assert float((found[0] == wanted[0]).float().mean()) > 0.99
            exact = gradient_of(copy.deepcopy(norm).float(), x.float(), above.float())[1]
            away = [float((one.float() - exact).norm()) for one in (found[1], wanted[1])]
            assert away[0] <= 1.02 * away[1]
            continue
        for one, other in zip(found, wanted, strict=True):
            assert float((one - other).abs().max()) <= 1e-6 * float(other.abs().max())


class _Own(nn.Module):
    """A norm as Llama's, by which others are told apart."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight, self.eps, self.added = nn.Parameter(torch.ones(width), requires_grad=False), eps, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.added)).to(x.dtype)


class OwnRMSNorm(_Own):
    pass


class OtherNorm(_Own):
    pass


class MovedRMSNorm(_Own):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(WIDTH))


class GatedRMSNorm(_Own):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return super().forward(x) * gate


class PerhapsGatedRMSNorm(_Own):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(x) if gate is None else super().forward(x) * gate


class LateRMSNorm(_Own):
    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.added))).to(x.dtype)


def is_taken(norm: nn.Module) -> bool:
    OneStep.take_over(norm)
    return isinstance(norm, OneStep)


def test_norms_that_are_something_else_are_left_alone() -> None:
    """By name or by number: Gemma's add 1 to their weight; another constant, a bias, a gate; what rounds after the weight."""
    assert not any(isinstance(norm, OneStep) for norm in norms_of("gemma3"))
    assert is_taken(OwnRMSNorm())
    other = OwnRMSNorm()
    other.added = 1.3e-6
    assert not any(map(is_taken, (other, OtherNorm(), MovedRMSNorm(), GatedRMSNorm(), nn.RMSNorm(WIDTH))))
    assert not any(is_taken(OwnRMSNorm().to(dtype)) for dtype in (torch.float16, torch.float64))
    assert not is_taken(LateRMSNorm().bfloat16())


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
@pytest.mark.parametrize("width", [64, 576, 2048, 8192])
def test_norms_of_every_width_are_taken(width: int, eps: float) -> None:
    """Of many numbers in bfloat16 some round the other way, both times that they are rounded."""
    assert is_taken(OwnRMSNorm(width, eps).bfloat16())
    assert is_taken(OwnRMSNorm(width, eps))


def test_what_was_not_tried_is_left_to_the_norm_itself() -> None:
    """A second input, an input by its name, a constant that became no float, a dtype that it was cast to later."""
    gated, x = PerhapsGatedRMSNorm(), torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    assert is_taken(gated)
    assert torch.equal(gated(x, torch.zeros(())), torch.zeros_like(x))
    assert torch.equal(gated(x=x), _Own()(x))
    gated.eps = 0  # type: ignore[assignment]
    assert torch.equal(gated(x), _Own()(x))
    late = LateRMSNorm()
    nn.init.normal_(late.weight, generator=torch.Generator().manual_seed(1))
    assert is_taken(late)
    assert torch.equal(late.bfloat16()(x.bfloat16()), LateRMSNorm.forward(late, x.bfloat16()))


def test_gradients_are_as_exact_within_autocast() -> None:
    norm, generator = norms_of("llama")[0], torch.Generator().manual_seed(0)
    x, above = (torch.randn(50, WIDTH, generator=generator) for _ in range(2))
    wanted = gradient_of(norm, x, above)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient_of(norm, x, above)[1], wanted)


def test_a_weight_that_learns_gets_its_gradient_and_another_dtype_its_own() -> None:
    norm = norms_of("llama")[0]
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    assert isinstance(norm, OneStep)
    assert norm(x.bfloat16()).dtype == torch.float32, "as the model's own does: the wider of the two"
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_a_norm_keeps_its_name_and_can_be_copied_and_pickled() -> None:
    norm = norms_of("llama")[0]
    assert type(norm).__name__ == "LlamaRMSNorm"
    x = torch.ones(2, WIDTH)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(other) is type(norm)
        assert torch.equal(other(x), norm(x))
        other.weight.mul_(2)
        assert torch.equal(other(x), 2 * norm(x))


def test_a_compiler_reads_the_models_own_norm() -> None:
    """It makes one loop of it, and of what stands around it."""
    norm, called = norms_of("llama")[0], list[str]()

    def backend(graph: torch.fx.GraphModule, inputs: object) -> object:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    x = torch.randn(4, WIDTH, requires_grad=True)
    torch.compile(norm, backend=backend, fullgraph=True)(x)
    torch._dynamo.reset()
    assert any("rsqrt" in target for target in called)
    assert not any("norm" in target for target in called)


def test_less_is_kept_for_the_gradient() -> None:
    """The input and a number a row; the model's own keeps it in float32 twice."""
    norm, held = norms_of("llama", torch.bfloat16)[0], []
    x = torch.ones(1 << 12, WIDTH, dtype=torch.bfloat16).requires_grad_()
    for _ in range(2):
        held.append(peak_bytes(lambda: norm(x).float().sum(), torch.device("cpu")))
        if isinstance(norm, OneStep):
            norm.give_back()
    assert held[0] < 0.75 * held[1]


def test_the_published_recipe_has_the_norms_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is tried anew after its steps, which are timed."""
    model = add_adapter(tiny_model("llama"), rank=4)
    encoder = Encoder(model, source_fingerprint="llama")
    norms_in_one_step(encoder.causal_lm)
    taken = [module for module in encoder.modules() if isinstance(module, OneStep)]
    monkeypatch.setattr("pykalm.model.norms._is_like", lambda module: pytest.fail("a norm was tried"))
    with adapters_of_peft(encoder):
        assert not any(isinstance(module, OneStep) for module in encoder.modules())
    assert taken == [module for module in encoder.modules() if isinstance(module, OneStep)] != []


def test_a_run_has_norms_in_one_step() -> None:
    model = tiny_model("llama").requires_grad_(False)
    language_model = SimpleNamespace(fingerprint="tiny")
    encoder = build_encoder(model, language_model, Config(graph="world", model="tiny"), temperature=0.05)  # type: ignore[arg-type]
    named = [module for module in encoder.modules() if type(module).__name__.endswith("RMSNorm")]
    assert named
    assert all(isinstance(module, OneStep) for module in named)
