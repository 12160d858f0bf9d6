"""The fused kernels compute what the eager formulas compute; where they cannot, nothing is lost."""

from __future__ import annotations

import copy
import inspect
import re
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qsam
from qsam import compiling, formulas, kernel_build, kernels, sweeps
from qsam.backend import SMALLEST, using
from qsam.functional import fake_quantize
from qsam.kernels import Grid
from qsam.quantizers import LSQ
from qsam.sweeps import Weight
from tests.models import CONV, MLP
from tests.optim.methods import METHODS, QUANTIZING, assert_on_grid, latents, train

KINDS = [
    pytest.param({}, (33, 7, 5), id="per_tensor"),
    pytest.param({}, (1025,), id="per_tensor-flat"),
    pytest.param({"granularity": "per_channel", "axis": 0}, (12, 40), id="per_channel"),
    pytest.param({"granularity": "per_channel", "axis": 1}, (12, 40), id="per_channel-axis-1"),
    pytest.param({"granularity": "per_group", "axis": 0, "group_size": 8}, (12, 40), id="per_group"),
]
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.long)]


@pytest.fixture(autouse=True)
def _backend() -> object:
    """Leave the process as it was."""
    with using("auto"):
        yield


def lsq(kind: dict[str, object], x: Tensor, *, bits: int = 3, shrink: float = 0.6) -> LSQ:
    q = LSQ(bits=bits, **kind)
    q.observe_(x.float())
    q.requires_grad_(True)
    q.scale.data.mul_(shrink)  # so that some entries are clipped
    return q


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def passed(backend: str, q: LSQ, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q(x) and its gradients."""
    q.scale.grad = None
    leaf = x.detach().requires_grad_()
    with using(backend):
        out = q(leaf)
        out.backward(values(tuple(out.shape), out.dtype, 1))
    return out.detach(), leaf.grad, q.scale.grad


def assert_sums_agree(ours: Tensor, theirs: Tensor, terms: int) -> None:
    """Two orders of one sum in fp32 differ by about eps * sqrt(terms) of its largest partial sum; 8 is slack."""
    bound = 8 * torch.finfo(torch.float32).eps * terms**0.5
    torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_backward_are_the_eager_ones(kind, shape, dtype):
    x = values(shape, dtype)
    q = lsq(kind, x)
    (out, dx, ds), (out_e, dx_e, ds_e) = passed("compiled", q, x), passed("eager", q, x)
    assert torch.equal(out, out_e)
    assert torch.equal(dx, dx_e)
    assert_sums_agree(ds, ds_e, x.numel())


def test_codes_are_equal_bit_for_bit_at_every_width_and_on_ties():
    for bits in range(2, 9):
        for signed in (True, False):
            q = LSQ(bits=bits, signed=signed)
            q.scale.data.fill_(0.137)
            x = (torch.arange(-600, 600) / 2 * q.scale).detach().reshape(60, 20)
            with torch.no_grad(), using("compiled"):
                out = q(x)
            assert torch.equal(out, q.dequantize(q.codes(x)))


@pytest.mark.parametrize("value", [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 3e38])
def test_special_values_are_the_eager_ones(value):
    x = torch.full((4, 8), value)
    x[0] = 0.3
    q = LSQ(bits=4)
    q.scale.data.fill_(0.1)
    q.requires_grad_(True)
    (*ours, ds), (*theirs, ds_e) = passed("compiled", q, x), passed("eager", q, x)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7))
    torch.testing.assert_close(ds, ds_e, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("scale", [-0.1, 0.0])
def test_a_scale_that_is_not_positive_is_the_eager_one(scale):
    q = LSQ(bits=4).requires_grad_(True)
    q.scale.data.fill_(scale)
    x = values((8, 16)) if scale else torch.zeros(8, 16)
    for ours, theirs in zip(passed("compiled", q, x), passed("eager", q, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_only_the_gradients_that_are_asked_for_are_computed():
    x = values((16, 16))
    q = lsq({}, x)
    with using("compiled"):
        (ds,) = torch.autograd.grad(q(x).sum(), q.scale)
        q.requires_grad_(False)
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(q(leaf).sum(), leaf)
        assert not q(x).requires_grad
    assert ds.shape == (1,)
    assert torch.equal(dx, ((x / q.scale).abs() < 4).float() * ((x / q.scale) < 3))


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
def test_a_layout_with_gaps_gives_what_its_copy_gives(layout):
    x = values((4, 6, 8, 10))
    x = {
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": x[:, ::2],
    }[layout]
    q = lsq({}, x)
    with using("compiled"):
        strided = x.detach().requires_grad_()
        dense = x.detach().contiguous().requires_grad_()
        (a,) = torch.autograd.grad(q(strided).square().sum(), strided)
        (b,) = torch.autograd.grad(q(dense).square().sum(), dense)
        assert torch.equal(q(strided), q(dense))
    assert torch.equal(a, b)


def test_a_second_derivative_and_vmap_go_the_eager_way():
    x = values((6, 12))
    q = lsq({}, x)

    def second(t):
        leaf = t.clone().requires_grad_()
        (first,) = torch.autograd.grad(q(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.autograd.grad(first.sum(), leaf)[0]

    with using("compiled"):
        fused, mapped = second(x), torch.func.vmap(q)(x)
    with using("eager"):
        assert torch.equal(fused, second(x))
        assert torch.equal(mapped, q(x))


def test_saved_for_backward_is_one_tensor_of_the_inputs_size_and_dtype():
    for dtype in (torch.float32, torch.bfloat16):
        saved: list[Tensor] = []
        x = values((64, 64), dtype).requires_grad_()
        q = lsq({}, x.detach())
        with (
            using("compiled"),
            torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t),
        ):
            q(x)
        assert [(t.dtype, t.numel()) for t in saved if t.numel() > 1] == [(dtype, x.numel())]
        assert next(t for t in saved if t.numel() > 1).data_ptr() == x.data_ptr()


# --- the verbs ------------------------------------------------------------------------------------------------------


def verbs(rows: int) -> tuple[Tensor, Grid, Tensor, Tensor]:
    w, grad = values((12, 40)), values((12, 40), seed=1)
    scale = 0.3 + 0.01 * torch.arange(rows, dtype=torch.float32).reshape(-1, 1)
    return w, Grid(scale.reshape(1) if rows == 1 else scale, -2, 1, 0.25, rows), grad, torch.empty_like(w)


ROWS = [1, pytest.param(12, marks=pytest.mark.long)]


@pytest.mark.parametrize("rows", ROWS)
def test_the_verbs_are_their_formulas(rows):
    w, grid, grad, p = verbs(rows)
    leaves = [w.clone().requires_grad_(), grid.scale.clone().requires_grad_()]
    q = fake_quantize(*leaves, grid.quant_min, grid.quant_max, grid.grad_scale)
    dw, ds = torch.autograd.grad(q, leaves, grad)
    with using("compiled"):
        assert sweeps.write_([Weight(w, p, grid)]) == [True]
        assert torch.equal(p, q)
        assert bool(sweeps.holds([Weight(w, p, grid)])[0])
        ((found, same),) = sweeps.scale_gradients([Weight(w, p, grid)], [grad])
        ((pulled, same_too),) = sweeps.pull_back_([Weight(w, p, grid)], [grad])
    assert bool(same)
    assert bool(same_too)
    assert_sums_agree(found, ds, w.numel())
    assert_sums_agree(pulled, ds, w.numel())
    assert torch.equal(grad, dw)
    assert torch.equal(p, w)  # parked


@pytest.mark.parametrize("rows", ROWS)
def test_perturbing_adds_c_times_d_to_what_is_on_the_grid(rows):
    w, grid, direction, p = verbs(rows)
    version, coefficient = p._version, torch.tensor(0.37)
    with using("compiled"):
        sweeps.write_([Weight(w, p, grid)])
        expected = p.clone().addcmul_(direction, coefficient)
        kept = direction.clone()
        (same,) = sweeps.perturb_([Weight(w, p, grid)], [direction], [coefficient])
        assert bool(same)
        torch.testing.assert_close(p, expected, rtol=2e-7, atol=1e-7)  # addcmul rounds once
        assert torch.equal(direction, kept)
        assert p._version > version
        assert sweeps.perturb_([Weight(w, p, grid)], [direction], [coefficient]) == [False], "p is not Q(w) now"
        assert sweeps.perturb_([Weight(w, p, None)], [direction], [coefficient]) == [None]
        assert sweeps.perturb_([Weight(w, p, grid)], [direction.t()], [coefficient]) == [None]


def test_weights_that_fit_are_swept_and_the_others_are_left_alone():
    (w, grid, grad, p), (other, _, _, _) = verbs(1), verbs(1)
    held = torch.zeros_like(p)
    weights = [Weight(other.t(), held, grid), Weight(w, p, grid), Weight(other, held, None)]
    with using("compiled"):
        assert sweeps.write_(weights) == [False, True, False]
        found = sweeps.pull_back_(weights, [grad.t(), grad, grad.clone()])
    assert [each is not None for each in found] == [False, True, False]
    assert torch.equal(p, w)
    assert not held.any()


@pytest.mark.filterwarnings("ignore:16-bit parameters round the perturbation away")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_train_with_kernels(dtype):
    ends = []
    for backend in ("compiled", "eager"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4)).to(dtype)
        qsam.quantize_(model, activations=None)
        optimizer = qsam.SAQ(model, torch.optim.SGD, lr=0.1)
        x = values((8, 16), dtype)

        def closure(optimizer=optimizer, model=model, x=x):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            return loss

        with using(backend):
            ends.append([optimizer.step(closure).item() for _ in range(3)])
    assert ends[0] == pytest.approx(ends[1], rel=1e-6 if dtype == torch.float64 else 2e-2)


def test_the_weights_of_a_model_are_counted_together():
    w = values((SMALLEST // 2,))
    grid = Grid(torch.full((1,), 0.1), -8, 7, 0.01, 1)
    one, none = Weight(w, torch.empty_like(w), grid), Weight(w, torch.empty_like(w), None)
    for weights, expected in (([one], [False]), ([one, none], [False, False]), ([one, one], [True, True])):
        assert sweeps.write_(weights) == expected


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("entry", "expected"), [(0.123, False), (float("nan"), True)])
def test_one_foreign_entry_is_seen_and_nan_is_nobodys_write(rows, entry, expected):
    w, grid, grad, p = verbs(rows)
    with using("compiled"):
        sweeps.write_([Weight(w, p, grid)])
        p[3, 7] = entry
        assert bool(sweeps.holds([Weight(w, p, grid)])[0]) is expected
        assert bool(sweeps.scale_gradients([Weight(w, p, grid)], [grad])[0][1]) is expected
        assert bool(sweeps.pull_back_([Weight(w, p, grid)], [grad])[0][1]) is expected


def test_a_write_counts_as_one_for_autograd():
    w, grid, _, p = verbs(1)
    version = p._version
    with using("compiled"):
        sweeps.write_([Weight(w, p, grid)])
    assert p._version > version


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("granularity", ["per_tensor", pytest.param("per_channel", marks=pytest.mark.long)])
def test_training_agrees_between_the_back_ends(method, granularity):
    if not method.quantizes and granularity != "per_tensor":
        pytest.skip("nothing is quantized")
    found = []
    for backend in ("eager", "compiled"):
        with using(backend):
            model = method.model(MLP, **({"granularity": granularity} if method.quantizes else {}))
            optimizer = method(model, torch.optim.SGD, lr=0.05)
            train(optimizer, model, MLP, 4)
            assert_on_grid(optimizer)
            found.append(latents(optimizer, model))
    for name in found[0]:  # four steps of sums in another order
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", QUANTIZING, ids=str)
def test_after_an_exception_in_the_base_the_parked_latents_come_back(method):
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise OSError("the base fails")

    with using("compiled"):
        model = method.model(CONV)
        optimizer = method(model, Fails, lr=0.1)
        before = latents(optimizer, model)
        with pytest.raises(OSError, match="the base fails"):
            train(optimizer, model, CONV, 1)
        assert_on_grid(optimizer)
        weights = {slot.path for slot in optimizer._latents.slots}
        after = latents(optimizer, model)
        assert all(torch.equal(before[name], after[name]) for name in weights)


# --- choosing -------------------------------------------------------------------------------------------------------


def test_auto_leaves_small_tensors_eager_and_fuses_large_ones():
    grid = Grid(torch.ones(1), -8, 7, 1.0, 1)
    assert kernels.quantized(torch.ones(8, 8), grid) is None
    assert kernels.quantized(torch.ones(SMALLEST), grid) is not None
    with using("eager"):
        assert kernels.quantized(torch.ones(SMALLEST), grid) is None


@pytest.mark.parametrize("backend", ["inductor", "Eager", None, 3])
def test_another_backend_is_refused_by_name(backend):
    with pytest.raises(ValueError, match="`backend` must be one of auto, eager, compiled, got"):
        qsam.set_backend(backend)


def test_without_a_compiler_auto_is_eager_and_says_so_once(monkeypatch):
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no compiler was found\nat all")

    monkeypatch.setattr(compiling, "compiled", fails)
    x = values((300, 300))
    q = lsq({}, x)
    with pytest.warns(
        UserWarning, match=r"cannot be compiled here and run eagerly.*\(RuntimeError: no compiler was found\)"
    ):
        out = q(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(q(x), out)
    with using("eager"):
        assert torch.equal(q(x), out)
    with using("compiled"), pytest.raises(RuntimeError, match="no compiler was found"):
        q(x)


def test_where_compiling_is_switched_off_auto_is_eager_and_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "compiled", compiling.compiled.__wrapped__)  # nothing that was compiled before
    x = values((300, 300))
    q = lsq({}, x)
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(UserWarning, match=r"run eagerly.*\(RuntimeError: torch.compile is switched off\)"),
    ):
        out = q(x)
    with using("eager"):
        assert torch.equal(q(x), out)


def test_the_first_kernel_may_be_compiled_in_inference_mode_and_under_autocast(monkeypatch):
    monkeypatch.setattr(compiling, "compiled", compiling.compiled.__wrapped__)
    x = values((300, 300))
    q = lsq({}, x)
    with using("compiled"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        out = q(x)
    with using("eager"):
        assert torch.equal(q(x), out)


def test_a_compiled_model_holds_the_formulas_themselves():
    x = values((16, 32))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    qsam.quantize_(model, rules=[("*", {})])
    qsam.calibrate(model, [x])
    with using("compiled"):
        expected = model(x)
        compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)


def test_a_compiled_kernel_keeps_no_tensor():
    kernel = compiling.compiled(formulas.distance, (torch.float64,) * 3, 1, torch.device("cpu"))
    assert not [value for value in vars(kernel).values() if isinstance(value, Tensor)]
    w = torch.arange(70_000, dtype=torch.float64)
    assert kernel(w, w.clone(), torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1e5])) == 0


@pytest.mark.parametrize("rows", [1, 8])
def test_a_weight_of_another_size_is_an_error_and_writes_no_memory(rows):
    """A kernel would write as many entries as the latent has."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    qsam.quantize_(model, granularity="per_channel" if rows > 1 else "per_tensor", rules=[("*", {"activations": None})])
    with using("compiled"):
        optimizer = qsam.JointSAM(model, torch.optim.SGD, lr=0.1, rho=0.1)
        before = model[0].weight.data
        with pytest.raises(RuntimeError, match="size of tensor"), optimizer.latents():
            model[0].weight.data = torch.zeros(4, 4)
        assert model[0].weight.shape == (4, 4)
        model[0].weight.data = before
        grid = optimizer._latents.slots[0].quantizer.grid(before)
        weights = [Weight(before, torch.zeros(32), grid)]
        assert sweeps.write_(weights) == [False]
        assert sweeps.holds(weights) == [None]


def test_limits_are_fp32_whatever_the_default_dtype():
    w, s = values((300, 300)), torch.tensor([0.1])
    try:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            torch.set_default_dtype(dtype)
            for low, high in ((-8, 7), (-4, 3), (-16, 15)):
                found = kernels.quantized(w, Grid(s, low, high, 0.01, 1))
                assert torch.equal(found, fake_quantize(w, s, low, high, 0.01))
            for kernel in (formulas.write, formulas.pull_back):  # its examples and its check
                compiling.compiled.__wrapped__(kernel, dtypes_of(kernel), 1, torch.device("cpu"))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("shape", [(9, 20001), (16, 20000), (5, 3)])
def test_a_tensor_that_does_not_fit_its_scales_is_left_to_the_formula(shape):
    with using("compiled"):
        assert kernels.quantized(values(shape), Grid(torch.full((8, 1), 0.1), -4, 3, 0.01, 8)) is None


def test_groups_of_another_count_are_left_to_the_formula():
    q = lsq({"granularity": "per_group", "axis": 0, "group_size": 8}, values((12, 40)))
    assert q.grid(values((12, 40))) is not None
    assert q.grid(values((12, 80))) is None


class Narrow(LSQ):
    """Symmetric: as many codes below 0 as above."""

    @property
    def quant_min(self) -> int:
        return -self.quant_max


def test_a_subclass_with_limits_of_its_own_keeps_them():
    q = lsq({}, values((300, 300)), bits=2)
    q.__class__ = Narrow
    for backend in ("compiled", "eager"):
        with using(backend):
            assert q(values((300, 300))).div(q.scale).round().unique().tolist() == [-1.0, 0.0, 1.0]


def test_what_memory_does_not_tell_goes_the_eager_way():
    """A lazy negation; batched gradients; a trace, a tangent and a mode, which would not see a kernel."""
    x = values((64, 64))
    q = lsq({}, x)
    with using("eager"):
        expected = q(-x)
        leaf = x.clone().requires_grad_()
        grads = torch.stack([values((64, 64), seed=i) for i in range(3)])
        batched = torch.autograd.grad(q(leaf), (leaf, q.scale), grads, is_grads_batched=True)
    with using("compiled"):
        assert torch.equal(q(torch._neg_view(x)), expected)
        out = q(leaf)
        plain, negated = (torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in (-x, torch._neg_view(x)))
        assert torch.equal(plain, negated)
        for ours, theirs in zip(
            torch.autograd.grad(out, (leaf, q.scale), grads, is_grads_batched=True), batched, strict=True
        ):
            torch.testing.assert_close(ours, theirs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is deprecated
            traced = torch.jit.trace(q, x)
        assert torch.equal(traced(-x), expected)
        with torch.autograd.forward_ad.dual_level():
            assert kernels.quantized(x, q.grid(x)) is None
        with FlopCounterMode(display=False):
            assert torch.equal(q(-x), expected)
        assert kernels.quantized(x, q.grid(x)) is not None, "nothing of this has switched the kernels off"


@pytest.mark.long
def test_any_number_of_kinds_is_compiled():
    """torch.compile gives up on a function after eight."""
    device = torch.device("cpu")
    kinds = [((x, s), dims) for x in (torch.float32, torch.float64) for s in (torch.float32,) for dims in (1, 2)]
    kinds += [((x, torch.float64), dims) for x in (torch.float32, torch.float64, torch.bfloat16) for dims in (1, 2)]
    for (dtype, scale), dims in kinds:
        compiling.compiled.__wrapped__(formulas.write, (dtype, dtype, scale), dims, device)
    assert len(kinds) > 8


KERNELS = [
    getattr(formulas, name)
    for name in "write backward codes exact_codes pull_back scale_gradient distance rescale rescale_columns".split()
]


def dtypes_of(kernel):
    """Return the dtypes of a kernel's rows and of its scale."""
    others = {"codes": torch.int8, "product": torch.int32}
    names = list(inspect.signature(kernel).parameters)
    last = names.index("x_scale" if "x_scale" in names else "scale")
    return tuple(others.get(name, torch.float32) for name in names[: last + 1])


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__.strip("_"))
def test_a_kernel_sweeps_over_the_memory_once(kernel, dims):
    if dims == 1 and "rescale" in kernel.__name__:
        pytest.skip("its rows are never one")
    examples = [
        compiling._examples(kernel, dtypes_of(kernel), dims, torch.device("cpu"), small=small)
        for small in (False, True)
    ]
    with torch.no_grad():
        source = kernel_build.draft(kernel, *examples, "found").source
    loads = re.findall(r"loadu\(in_ptr0 \+ [^)]*\), static_cast<int64_t>\(16\)", source)
    assert len(loads) == 1, source


def writes_first(w, grad, p, grad_out, p_out, scale, limits):
    """What a compiler might make of a pull-back that it takes apart: p is gone when it is compared."""
    p_out.copy_(w)
    return formulas.pull_back(w, grad, p, grad_out, p_out, scale, limits)


def wrong_sum(*tensors):
    ds, far = formulas.pull_back(*tensors)
    return ds * 1.01, far


def writes_too_much(w, grad, *others):
    found = formulas.pull_back(w, grad, *others)
    w[..., 0] += 1.0
    return found


@pytest.mark.parametrize("wrong", [writes_first, wrong_sum, writes_too_much])
@pytest.mark.parametrize("dims", [1, 2])
def test_a_compiled_kernel_that_is_not_its_formula_is_refused(wrong, dims):
    right = formulas.pull_back
    dtypes, device = dtypes_of(right), torch.device("cpu")
    compiling._check(right, right, compiling._examples(right, dtypes, dims, device))
    with pytest.raises(RuntimeError, match="compiled kernel 'pull_back' does not compute what its formula does"):
        compiling._check(right, wrong, compiling._examples(right, dtypes, dims, device))


def test_the_grid_that_a_quantizer_knows_is_that_of_now():
    x = values((64, 40))
    q = lsq({}, x, bits=4)

    def assert_now(q, x):
        assert q.grid(x) == q._new_grid(x)
        with using("compiled"):
            ours = q(x)
        with using("eager"):
            assert torch.equal(ours, q(x))

    assert_now(q, x)
    assert q._known is not None
    assert_now(q, x[:, :20].contiguous())
    q.bits = 3
    assert_now(q, x)
    q.signed = False
    assert_now(q, x)
    q.scale = nn.Parameter(q.scale.detach() * 2)
    assert_now(q, x)
    q.scale.data = q.scale.data / 3
    assert_now(q, x)
    q.granularity, q.axis, q.scale.data = "per_channel", 0, q.scale.data.expand(64, 1).contiguous()
    assert_now(q, x)
    other = copy.deepcopy(q)
    assert other.grid(x).scale is other.scale
    torch.func.functional_call(q, {"scale": q.scale * 1.5}, (x,))
    assert q.grid(x).scale is q.scale
    copy.deepcopy(q)  # what it knows holds no graph


def test_a_scale_elsewhere_is_not_for_a_kernel():
    x = values((64, 40))
    assert kernels.fuses(x, Grid(torch.ones(1), -8, 7, 1.0, 1)) is False, "auto, and small"
    with using("compiled"):
        assert kernels.fuses(x, Grid(torch.ones(1), -8, 7, 1.0, 1))
        assert not kernels.fuses(x, Grid(torch.ones(1, device="meta"), -8, 7, 1.0, 1))


@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_a_second_derivative_counts_what_an_input_was_made_of_once(backend):
    """The input's history leads to the scale too."""
    x = values((64, 40))
    q = lsq({}, x, bits=4)
    with using(backend):
        out = q(q(x.requires_grad_()).tanh() * 2)
        found = torch.autograd.grad(out.square().sum(), [x, q.scale], create_graph=True)
    expected = torch.autograd.grad(q(q(x).tanh() * 2).square().sum(), [x, q.scale])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Narrowing(LSQ):
    """A grid that gets smaller."""

    levels = 7

    @property
    def quant_max(self) -> int:
        return self.levels


def test_limits_that_move_are_looked_up_each_time():
    x = values((64, 40))
    q = Narrowing(bits=4)
    q.observe_(x)
    for levels in (7, 3):
        q.levels = levels
        assert q.grid(x).quant_max == levels
