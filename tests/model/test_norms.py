"""Claims about norms in one step: the numbers and gradients of the model's own, only where those are what is computed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from pykalm.bench.plan import adapters_of_peft
from pykalm.learn.footprint import peak_bytes
from pykalm.model.adapters import add_adapter
from pykalm.model.encoder import Encoder
from pykalm.model.norms import OneStep, norms_in_one_step
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


def test_norms_that_are_something_else_are_left_alone() -> None:
    """Gemma's add 1 to their weight. A norm that adds something else to the mean square, or takes two inputs, or has a bias."""
    assert not any(isinstance(norm, OneStep) for norm in norms_of("gemma3"))

    class OtherRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(WIDTH), requires_grad=False), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 3e-6)

    class GatedRMSNorm(OtherRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
            return x * gate

    class MovedRMSNorm(OtherRMSNorm):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(WIDTH))

    for norm in (OtherRMSNorm(), GatedRMSNorm(), MovedRMSNorm(), nn.RMSNorm(WIDTH)):
        OneStep.take_over(norm)
        assert not isinstance(norm, OneStep)


def test_a_weight_that_learns_gets_its_gradient_and_another_dtype_its_own() -> None:
    norm = norms_of("llama")[0]
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
    assert isinstance(norm, OneStep)
    assert norm(x.bfloat16()).dtype == torch.float32, "as the model's own does: the wider of the two"
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad is not None


def test_a_norm_keeps_its_name_and_can_be_copied() -> None:
    norm = norms_of("llama")[0]
    assert type(norm).__name__ == "LlamaRMSNorm"
    other, x = copy.deepcopy(norm), torch.ones(2, WIDTH)
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


def test_the_published_recipe_has_the_norms_of_transformers() -> None:
    model = add_adapter(tiny_model("llama"), rank=4)
    encoder = Encoder(model, source_fingerprint="llama")
    norms_in_one_step(encoder.causal_lm)
    taken = [module for module in encoder.modules() if isinstance(module, OneStep)]
    with adapters_of_peft(encoder):
        assert not any(isinstance(module, OneStep) for module in encoder.modules())
    assert taken == [module for module in encoder.modules() if isinstance(module, OneStep)] != []
