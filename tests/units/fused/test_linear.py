"""A Linear layer that quantizes its own input, by integers where it can: the same numbers, and no caller notices."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import qsam
from qsam.functional import fake_quantize
from qsam.fused import linear
from qsam.fused.kernels import using
from tests.methods import QUANTIZING, needs_kernels

EPS = torch.finfo(torch.float32).eps

needs_instructions = pytest.mark.skipif(not linear._has_instructions(), reason="no instructions for int8 here")


@pytest.fixture(autouse=True)
def _compiled():
    needs_kernels()
    with using("compiled"):
        yield


@pytest.fixture
def products(monkeypatch):
    """Return a list that grows by one with each product of integers."""
    found = []
    multiply = torch._int_mm

    def counting(*args, **kwargs):
        found.append(args)
        return multiply(*args, **kwargs)

    monkeypatch.setattr(torch, "_int_mm", counting)
    return found


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(
    features: int = 40, out: int = 24, *, bits: int = 4, activation_bits: int = 8, bias: bool = True,
    granularity: str = "per_tensor", signed: bool = True, written: bool = True, weights: str = "lsq",
) -> nn.Linear:  # fmt: skip
    """Return a quantized Linear whose weight is on its grid."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(features, out, bias=bias))
    settings = {"bits": bits, "activation_bits": activation_bits, "granularity": granularity, "weights": weights}
    qsam.quantize_(model, rules=[("*", settings)])
    x = drawn(300, features, seed=1)
    qsam.calibrate(model, [x if signed else x.relu()])
    if written:
        qsam.write_(model)
    return model[0]


def as_before(module: nn.Linear, x: Tensor) -> Tensor:
    """Return what the layer is defined to compute: a product of the two fake-quantized numbers."""
    q = module.input_quantizer
    grid = q.grid(x)
    quantized = fake_quantize(x, q.scale, grid.quant_min, grid.quant_max, grid.grad_scale)
    return functional.linear(quantized, module.weight, module.bias)


def gradients(module: nn.Linear, x: Tensor, run) -> list[Tensor]:
    module.zero_grad()
    module.input_quantizer.scale.grad = None
    leaf = x.detach().requires_grad_()
    out = run(leaf)
    out.backward(drawn(*out.shape, seed=2))
    return [leaf.grad, *(p.grad for p in module.parameters() if p.grad is not None)]


# --- the numbers ------------------------------------------------------------------------------------------------------


@needs_instructions
@settings(max_examples=20)
@given(
    grid=st.sampled_from([*(("lsq", b) for b in range(2, 9)), *(("stretched", b) for b in range(2, 8))]),
    activation_bits=st.integers(2, 8), signed=st.booleans(), bias=st.booleans(),
    granularity=st.sampled_from(["per_tensor", "per_channel"]), rows=st.integers(128, 200),
    features=st.integers(16, 70), out=st.integers(1, 70),
)  # fmt: skip
def test_a_product_of_integers_is_the_exact_one_rounded_four_times(
    grid, activation_bits, signed, bias, granularity, rows, features, out
):
    """acc -> fp32, times s_x, times s_W, plus b: a product in fp32 sums up `features` roundings."""
    weights, bits = grid
    module = layer(
        features, out, bits=bits, activation_bits=activation_bits, bias=bias, granularity=granularity, signed=signed,
        weights=weights,
    )  # fmt: skip
    x = drawn(rows, features, seed=3)
    x = x if signed else x.relu()
    found = module(x)
    grid = module.input_quantizer.grid(x)
    with torch.no_grad():
        rows = torch.empty(rows, out)
        assert linear._of_integers(x, grid, module.weight, module.bias, module.weight_quantizer, rows)
    assert torch.equal(rows, found)
    levels = module.weight_quantizer.codes(module.weight).double() + module.weight_quantizer.offset
    codes = module.input_quantizer.codes(x).double() @ levels.t()
    steps = module.input_quantizer.scale.double() * module.weight_quantizer.scale.double().view(1, -1)
    exact = codes * steps
    expected = exact + module.bias.double() if bias else exact
    assert ((found - expected).abs() <= 2 * EPS * (exact.abs() + expected.abs())).all()


@pytest.mark.parametrize(
    ("rows", "features", "off_grid", "backend"),
    [(130, 128, True, "compiled"), (0, 96, False, "compiled"), (1, 96, False, "compiled"), (130, 15, False, "compiled"),
     (130, 96, False, "eager"), (130, 96, False, "auto")],
)  # fmt: skip
def test_what_is_off_its_grid_or_too_small_is_multiplied_as_it_is(products, rows, features, off_grid, backend):
    module = layer(features, 72)
    if off_grid:
        with torch.no_grad():
            module.weight[5, 7] += 1e-6
    x = drawn(rows, features)
    with using(backend):
        assert torch.equal(module(x), as_before(module, x))
    assert not products


@needs_instructions
@pytest.mark.parametrize(("case", "in_perturbed"), [(3, 0), (2, 1)])
def test_a_perturbed_weight_is_not_looked_at_unless_it_was_quantized_after(case, in_perturbed, products, monkeypatch):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(128, 96))
    qsam.quantize_(module, rules=[("*", {"bits": 4, "activation_bits": 8})])
    qsam.calibrate(module, [drawn(130, 128)])
    optimizer = qsam.SAQ(module, torch.optim.SGD, lr=0.01, rho=0.1, case=case)
    looks = []
    codes = linear.codes
    monkeypatch.setattr(linear, "codes", lambda x, grid: looks.append(x is module[0].weight) or codes(x, grid))
    for block, expected in ((optimizer.first_pass, 1), (optimizer.perturbed, in_perturbed)):
        looks.clear()
        products.clear()
        with block():
            module(drawn(130, 128)).square().sum().backward()
        assert (sum(looks), len(products)) == (expected, expected)


@needs_instructions
def test_a_layer_that_is_not_perturbed_multiplies_integers_in_a_perturbed_pass(products):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96))
    qsam.quantize_(model, rules=[("*", {"bits": 4, "activation_bits": 8})])
    qsam.calibrate(model, [drawn(130, 96)])
    optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.01, perturb=lambda name, p: name == "1.weight")
    for block, expected in ((optimizer.first_pass, 2), (optimizer.perturbed, 1)):
        products.clear()
        with block():
            model(drawn(130, 96)).square().sum().backward()
        assert len(products) == expected
    optimizer.step()
    products.clear()
    model(drawn(130, 96))
    assert len(products) == 2


@needs_instructions
def test_what_others_write_into_the_weight_is_seen_at_once(products):
    module = layer(128, 96)
    x = drawn(130, 128)
    before = module(x)
    assert len(products) == 1
    module.weight.data.neg_().clamp_(-module.weight_quantizer.scale.item(), module.weight_quantizer.scale.item())
    torch.testing.assert_close(module(x), as_before(module, x), rtol=1e-5, atol=1e-5)
    assert len(products) == 2
    assert not torch.allclose(module(x), before)


@pytest.mark.parametrize(
    ("granularity", "on_grid", "shape"),
    [
        ("per_tensor", True, (130, 96)),
        ("per_channel", False, (13, 10, 96)),
        ("per_channel", True, (2, 5, 13, 96)),
        ("per_tensor", False, (3, 96)),
    ],
)
def test_gradients_are_those_of_the_formula(granularity, on_grid, shape):
    """Of x, W and b bit for bit; of s, a sum of all entries, to rounding."""
    module = layer(96, 72, granularity=granularity, written=on_grid)
    x = drawn(*shape)
    found, expected = gradients(module, x, module), gradients(module, x, lambda leaf: as_before(module, leaf))
    assert len(found) == 4
    for ours, theirs in zip(found, expected, strict=True):
        if ours.numel() == 1:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("left_out", ["x", "scale", "bias", "all but x", "all but weight"])
def test_what_needs_no_gradient_gets_none(left_out):
    module = layer(96, 72)
    leaves = {"x": drawn(130, 96), "scale": module.input_quantizer.scale, "weight": module.weight, "bias": module.bias}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == left_out[8:] if left_out.startswith("all but") else name != left_out)
    module(leaves["x"]).sum().backward()
    found = {name: leaf.grad for name, leaf in leaves.items()}
    assert {name for name, grad in found.items() if grad is not None} == {
        name for name, leaf in leaves.items() if leaf.requires_grad
    }
    for leaf in leaves.values():
        leaf.grad = None
    as_before(module, leaves["x"]).sum().backward()
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_it(value):
    module = layer(96, 72)
    x = drawn(130, 96)
    x[3, 4] = value
    torch.testing.assert_close(module(x), as_before(module, x), rtol=1e-5, atol=1e-5, equal_nan=True)
    x[3, 4] = 0.0
    with torch.no_grad():
        module.weight[2, 3] = value
    torch.testing.assert_close(module(x), as_before(module, x), rtol=1e-5, atol=1e-5, equal_nan=True)


def test_the_backward_keeps_the_input_and_not_what_it_was_rounded_to():
    module = layer(96, 72)
    x = drawn(130, 96).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        module(x)
    ours = (x, module.input_quantizer.scale, module.weight)
    assert sorted(kept) == sorted(t.data_ptr() for t in ours)


def test_an_input_that_was_written_over_is_refused():
    module = layer(96, 72)
    x = drawn(130, 96).requires_grad_() * 1.0
    out = module(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("on_grid", "bias"), [(True, False), (False, True)])
def test_the_output_may_be_written_into(on_grid, bias):
    module = layer(96, 72, bias=bias, written=on_grid)
    x = drawn(2, 5, 13, 96)
    found = gradients(module, x, lambda t: module(t).tanh_())
    expected = gradients(module, x, lambda t: as_before(module, t).tanh())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@needs_instructions
@pytest.mark.parametrize("make", [lambda n: drawn(2 * n)[::2], lambda n: torch.tensor([1.5]).expand(n)])
def test_a_bias_of_any_layout_is_added(products, make):
    module = layer(96, 72)
    module.bias = nn.Parameter(make(72))
    assert not module.bias.is_contiguous()
    x = drawn(130, 96)
    torch.testing.assert_close(module(x), as_before(module, x), rtol=1e-5, atol=1e-5)
    assert products


@pytest.mark.parametrize(("dtype", "whose"), [(torch.float64, "input_quantizer"), (torch.bfloat16, "weight_quantizer")])
def test_scales_of_other_dtypes_are_believed(dtype, whose):
    module = layer(96, 72)
    quantizer = module.get_submodule(whose)
    quantizer.scale.data = quantizer.scale.data.to(dtype)
    x = drawn(130, 96)
    torch.testing.assert_close(module(x), as_before(module, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [1e-19, 1e15])
def test_scales_whose_product_is_no_number_give_the_right_one(size):
    module = layer(96, 72, bias=False)
    with torch.no_grad():
        for quantizer in (module.input_quantizer, module.weight_quantizer):
            quantizer.scale.mul_(size)
        module.weight.copy_(module.weight_quantizer(module.weight * size))
    x = drawn(130, 96) * size
    expected = as_before(module, x)
    assert ((module(x) - expected).abs().max() <= 1e-5 * expected.abs().max()) and expected.abs().max() > 0


# --- no caller notices -------------------------------------------------------------------------------------------------


def test_hooks_see_the_quantized_input():
    """With a hook of somebody else's the layer's input is quantized before it, as everywhere."""
    module = layer(96, 72)
    x = drawn(130, 96)
    expected = module.input_quantizer(x)
    seen = []

    def see(m, args, *_):
        if m is module:
            seen.append(args[0])

    everywhere = nn.modules.module.register_module_forward_hook
    for register in (module.register_forward_pre_hook, module.register_forward_hook, everywhere):
        handle = register(see)
        try:
            module(x)
        finally:
            handle.remove()
    assert len(seen) == 3
    assert all(type(t) is Tensor and torch.equal(t, expected) for t in seen)
    module.register_full_backward_hook(lambda m, into, out: seen.append(into[0]))
    module(x.requires_grad_()).sum().backward()
    assert torch.equal(seen[3], (torch.ones(130, 72) @ module.weight))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):  # torch's own words
        module(drawn(130, 95))


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x.clamp_min(0.0))


def test_a_class_with_a_forward_of_its_own_gets_a_quantized_input():
    torch.manual_seed(0)
    model = nn.Sequential(Doubling(96, 72))
    qsam.quantize_(model, rules=[("*", {})])
    x = drawn(130, 96)
    qsam.calibrate(model, [x])
    expected = 2 * functional.linear(model[0].input_quantizer(x).clamp_min(0.0), model[0].weight, model[0].bias)
    assert torch.equal(model(x), expected)


def test_autocast_and_other_dtypes_take_the_ordinary_way(products):
    module = layer(96, 72)
    x = drawn(130, 96)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    assert copy.deepcopy(module).bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert copy.deepcopy(module).double()(x.double()).dtype == torch.float64
    assert not products


def test_transforms_and_compilers_take_the_ordinary_way(products):
    module = layer(96, 72)
    x = drawn(130, 96)
    expected = as_before(module, x)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(module)(x[None])[0], expected)
        assert torch.equal(torch.compile(module, backend="eager", fullgraph=True)(x), expected)
    found = torch.func.grad(lambda t: module(t).sum())(x)
    torch.testing.assert_close(found, torch.func.grad(lambda t: as_before(module, t).sum())(x))
    assert not products


def test_anything_but_a_linear_quantizes_a_deferred_input():
    module = layer(96, 72)
    x = drawn(130, 96)
    deferred = linear.deferred(module, module.input_quantizer, x)
    expected = module.input_quantizer(x)
    assert isinstance(deferred, linear.DeferredInput)
    assert torch.equal(torch.relu(deferred), expected.relu())
    assert torch.equal(torch.stack([deferred, x])[0], expected)
    assert torch.equal(functional.linear(deferred, weight=module.weight), expected @ module.weight.t())
    assert type(torch.relu(deferred)) is Tensor


def test_second_derivatives_and_batched_gradients():
    module = layer(96, 72)
    x = drawn(130, 96).requires_grad_()

    def curvature(run):
        first = torch.autograd.grad(run(x).square().sum(), [module.weight, x], create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), [module.weight, x])

    for ours, theirs in zip(curvature(module), curvature(lambda t: as_before(module, t)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)
    grads = drawn(3, 130, 72)
    (batched,) = torch.autograd.grad(module(x), x, grads, is_grads_batched=True)
    for found, grad in zip(batched, grads, strict=True):
        torch.testing.assert_close(found, torch.autograd.grad(module(x), x, grad)[0])


@pytest.mark.parametrize("hooked", [True, False])
def test_a_second_derivative_counts_a_layer_that_is_used_twice_as_often(hooked):
    """With a hook of somebody else's the quantization is a node of its own."""
    module = layer(96, 96)
    if hooked:
        module.register_forward_pre_hook(lambda m, args: None)
    x = drawn(130, 96).requires_grad_()
    leaves = [x, module.weight, module.bias, module.input_quantizer.scale]
    found = torch.autograd.grad(module(module(x).tanh()).square().sum(), leaves, create_graph=True)
    expected = torch.autograd.grad(as_before(module, as_before(module, x).tanh()).square().sum(), leaves)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
    grads = drawn(2, 130, 96)
    (batched,) = torch.autograd.grad(module(module(x).tanh()), module.weight, grads, is_grads_batched=True)
    assert batched.shape == (2, 96, 96)


def test_an_input_that_needs_no_gradient_may_change_where_scales_are_frozen():
    module = layer(96, 72)
    module.input_quantizer.scale.requires_grad_(False)
    x = drawn(130, 96)
    expected = as_before(module, x)
    out = module(x)
    x.zero_()
    out.sum().backward()
    assert torch.equal(out, expected)
    assert module.weight.grad.abs().sum() > 0


def test_where_functions_are_not_overridden_the_input_is_quantized_by_its_hook():
    module = layer(96, 72)
    x = drawn(130, 96)
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(module(x), as_before(module, x))
    with torch._C.DisableTorchFunction():
        assert torch.equal(module(x), as_before(module, x))


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    module = layer(96, 72)
    x = drawn(130, 96)
    found = gradients(module, x, lambda t: checkpoint(module, t, use_reentrant=reentrant))
    for ours, theirs in zip(found, gradients(module, x, module), strict=True):
        assert torch.equal(ours, theirs)


@needs_instructions
@pytest.mark.parametrize("method", [m for m in QUANTIZING if str(m) in ("saq", "squat-same_batch")], ids=str)
def test_a_model_trains_as_without(method, products):
    """Three steps by integers and three in fp32: apart by rounding, which a code on a tie may turn into a step."""

    def trained(backend):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 4))
        qsam.quantize_(model, bits=4, activation_bits=8)
        optimizer = method(model, torch.optim.SGD, lr=1e-2, **({"rho": 0.05} if method.perturbs else {}))
        x, y = drawn(256, 32), drawn(256, 4, seed=1)

        def closure():
            optimizer.zero_grad()
            loss = functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        with using(backend):
            losses = [optimizer.step(closure).item() for _ in range(3)]
        return losses

    ours = trained("compiled")
    assert products, "the first pass of each step is on the grid"
    torch.testing.assert_close(ours, trained("eager"), rtol=1e-3, atol=0.0)


def test_a_wrong_product_of_integers_is_not_used_and_without_instructions_none_is_tried(monkeypatch, products):
    ask = linear._has_instructions.__wrapped__
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": False})
    assert not ask()
    assert not products
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (a.long() @ b.long()).clamp(-(2**15), 2**15 - 1).int())
    assert not ask()
