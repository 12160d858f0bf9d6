"""The fused kernels compute what the eager formulas compute; where they cannot, nothing is lost."""

from __future__ import annotations

import copy
import gc
import itertools
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qsam
from qsam import functional
from qsam.functional import Grid, fake_quantize
from qsam.fused import formulas, kernels, native
from qsam.fused.kernels import SMALLEST, Weight, using
from qsam.quantizers import LSQ, build_quantizer
from tests.methods import QUANTIZING, assert_on_grid, latents, needs_kernels, train
from tests.models import CONV, MLP

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TANGENTS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # torch's own, in jvp
BITS = {4: torch.int32, 8: torch.int64, 2: torch.int16}


@pytest.fixture(autouse=True)
def _backend() -> object:
    """Leave the process as it was."""
    with using("auto"):
        yield


@pytest.fixture
def compiled():
    needs_kernels()
    with using("compiled"):
        yield


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree in every bit, the sign of a zero too; NaN equals NaN."""
    kind = BITS[a.element_size()]
    numbers = ~(a.isnan() & b.isnan())
    return a.dtype == b.dtype and torch.equal(a.view(kind)[numbers], b.view(kind)[numbers])


def assert_sums_agree(ours: Tensor, theirs: Tensor, terms: Tensor) -> None:
    """Two orders of one sum of n terms differ by no more than 2 n eps sum |terms|."""
    bound = 2 * terms.numel() * torch.finfo(ours.dtype).eps * terms.abs().sum().item()
    assert (ours - theirs).abs().max().item() <= bound


def passed(backend: str, x: Tensor, scale: Tensor, limits: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """Return Q(x), dx and ds."""
    leaves = x.detach().requires_grad_(), scale.detach().clone().requires_grad_()
    with using(backend):
        out = fake_quantize(*leaves, *limits, 0.25)
        out.backward(values(tuple(out.shape), out.dtype, seed))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


# --- forward and backward -----------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """Draw a tensor, scales of every granularity, and limits."""
    dtype = draw(st.sampled_from(DTYPES))
    rows, columns = draw(st.integers(1, 9)), draw(st.sampled_from([2, 7, 16, 33, 8192, 8200, 20000]))
    shape = draw(st.sampled_from([(rows, columns), (rows, 1, columns), (columns,)]))
    of = draw(st.sampled_from(["tensor", "channel"])) if len(shape) > 1 else "tensor"
    scales = (1,) if of == "tensor" else (rows, *[1] * (len(shape) - 1))
    x = values(shape, dtype, draw(st.integers(0, 99)))
    scale = (0.05 + 0.4 * torch.rand(scales)) * draw(st.sampled_from([1.0, -1.0]))
    bits, signed = draw(st.integers(2, 8)), draw(st.booleans())
    return x, scale, functional.integer_limits(bits, signed)


@given(problems())
def test_forward_and_dx_are_the_eager_ones_bit_for_bit_and_ds_is_to_rounding(problem):
    needs_kernels()
    x, scale, limits = problem
    (out, dx, ds), (out_e, dx_e, ds_e) = (passed(backend, x, scale, limits) for backend in ("compiled", "eager"))
    assert same_bits(out, out_e)
    assert same_bits(dx, dx_e)
    assert_sums_agree(ds, ds_e, max(map(abs, limits)) * values(tuple(x.shape), x.dtype, 1))


@pytest.mark.usefixtures("compiled")
def test_codes_are_the_eager_ones_on_ties():
    for bits in range(2, 9):
        q = LSQ(bits=bits, signed=bool(bits % 2))
        q.scale.data.fill_(0.137)
        x = (torch.arange(-600, 600) / 2 * q.scale).detach().reshape(60, 20)
        with torch.no_grad():
            assert torch.equal(q(x), q.dequantize(q.codes(x)))


SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8, 3e38, 65504.0]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("dtype", "where"),
    [
        (torch.float32, "x"),
        (torch.float64, "grad"),
        (torch.bfloat16, "scale"),
        (torch.float16, "x"),
        (torch.float32, "scale"),
        (torch.bfloat16, "grad"),
    ],
    ids=str,
)
def test_special_values_are_the_eager_ones(dtype, where):
    x = values((len(SPECIAL), 40)).to(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)
    scale = torch.full((len(SPECIAL), 1), 0.1)
    grad = values(tuple(x.shape), dtype, 1)
    if where == "scale":
        scale[:, 0] = special.float()
    else:
        (x if where == "x" else grad)[:, 3] = special
    found = []
    for backend in ("compiled", "eager"):
        leaves = x.clone().requires_grad_(), scale.clone().requires_grad_()
        with using(backend):
            out = fake_quantize(*leaves, -8, 7, 1.0)
            out.backward(grad)
        found.append((out.detach(), leaves[0].grad, leaves[1].grad))
    for ours, theirs in zip(*(pair[:2] for pair in found), strict=True):
        assert same_bits(ours, theirs)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_read_and_written_as_torch_does(dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    for scale in (2.0**-30, 1e-3, 0.1, 3.0):
        found = [passed(backend, every, torch.tensor([scale]), (-128, 127))[0] for backend in ("compiled", "eager")]
        assert same_bits(*found)


@pytest.mark.usefixtures("compiled")
def test_the_gradient_of_a_scale_does_not_depend_on_the_number_of_threads():
    x, scale = values((300, 301)), torch.full((1,), 0.1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            found.append(passed("compiled", x, scale, (-8, 7)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("compiled")
def test_a_sum_of_many_terms_is_as_exact_as_one_block_is():
    """A plain fp32 sum of 2^22 times .1 is wrong by more than 1e-3."""
    x = torch.full((2**22,), 0.1)
    scale = torch.ones(1, requires_grad=True)
    fake_quantize(x, scale, -8, 7, 1.0).sum().backward()  # the code is 0, so dQ/ds is -.1
    exact = -x[0].double() * x.numel()
    assert abs(scale.grad.double() / exact - 1) < 1e-5


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", ["transposed", "channels_last", "sliced"])
@pytest.mark.parametrize("scales", [(1,), (4, 1, 1, 1)], ids=str)
def test_every_layout_gives_what_its_copy_gives(layout, scales):
    x = values((4, 6, 8, 10))
    x = {
        "transposed": x.transpose(1, 3),
        "channels_last": x.to(memory_format=torch.channels_last),
        "sliced": x[:, ::2],
    }[layout]
    scale = 0.2 + 0.05 * torch.arange(len(torch.ones(scales)), dtype=torch.float32).view(scales)
    strided, dense = (passed("compiled", t, scale, (-2, 1)) for t in (x, x.contiguous()))
    assert torch.equal(strided[0], dense[0])
    assert torch.equal(strided[1], dense[1]) or layout == "sliced"  # its gradient is drawn in another order
    eager = passed("eager", x, scale, (-2, 1))
    assert torch.equal(strided[1], eager[1])
    torch.testing.assert_close(strided[2], eager[2], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("compiled")
def test_a_channels_last_tensor_is_for_a_kernel_and_stays_it():
    x = values((4, 6, 8, 10)).to(memory_format=torch.channels_last)
    out = kernels.quantized(x, Grid(torch.full((1,), 0.1), -8, 7, 1.0, 1))
    assert out is not None
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert kernels.quantized(x[:, ::2], Grid(torch.full((1,), 0.1), -8, 7, 1.0, 1)) is None
    assert kernels.quantized(x, Grid(torch.full((24, 1), 0.1), -8, 7, 1.0, 24)) is None, "rows are not contiguous"


@TANGENTS
@pytest.mark.parametrize(
    ("backend", "kind"),
    [
        ("compiled", {}),
        ("compiled", {"granularity": "per_channel", "axis": 0}),
        ("eager", {"granularity": "per_channel", "axis": 1}),
    ],
)
def test_transforms_of_torch_func_agree_with_each_other(backend, kind):
    """The tangent is the straight-through one: jvp and jacfwd are jacrev, per-sample gradients those of a loop."""
    if backend == "compiled":
        needs_kernels()
    x, t = values((6, 4)), values((6, 4), seed=3)
    q = LSQ(bits=3, **kind)
    q.observe_(x)
    q.scale.data.mul_(0.6)

    def of(x: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(q, {"scale": scale}, (x,))

    scale, s = q.scale.detach(), torch.rand(q.scale.shape)
    with using(backend):
        value, tangent = torch.func.jvp(of, (x, scale), (t, s))
        reverse = torch.func.jacrev(of, argnums=(0, 1))(x, scale)
        forward = torch.func.jacfwd(of, argnums=(0, 1))(x, scale)
        mapped = torch.func.vmap(of, (0, None))(x[None].expand(2, 6, 4), scale)
        expected = of(x, scale)
    assert torch.equal(value, expected)
    assert torch.equal(mapped[1], expected)
    for ours, theirs in zip(forward, reverse, strict=True):
        torch.testing.assert_close(ours, theirs)
    product = sum(torch.tensordot(j, v, dims=v.dim()) for j, v in zip(reverse, (t, s), strict=True))
    torch.testing.assert_close(tangent, product)


@TANGENTS
def test_a_quantized_model_has_a_tangent(backend="compiled"):
    """The derivative along t, against one column of the Jacobian at a time."""
    needs_kernels()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    qsam.quantize_(model, rules=[("*", {})])
    x, t = values((5, 6)), values((5, 6), seed=1)
    qsam.calibrate(model, [x])
    with using(backend):
        _, tangent = torch.func.jvp(model, (x,), (t,))
        jacobian = torch.func.jacrev(model)(x)
        with torch.autograd.forward_ad.dual_level():
            dual = model(torch.autograd.forward_ad.make_dual(x, t))
            (_, again) = torch.autograd.forward_ad.unpack_dual(dual)
    torch.testing.assert_close(tangent, torch.tensordot(jacobian, t, dims=2))
    torch.testing.assert_close(again, tangent)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_for_backward_is_one_tensor_of_the_inputs_size_and_dtype(dtype):
    saved: list[Tensor] = []
    x = values((64, 64), dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fake_quantize(x, torch.tensor([0.1], requires_grad=True), -8, 7)
    (large,) = [t for t in saved if t.numel() > 1]
    assert (large.dtype, large.data_ptr()) == (dtype, x.data_ptr())


# --- the verbs ----------------------------------------------------------------------------------------------------------


def verbs(rows: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> tuple[Tensor, Grid, Tensor, Tensor]:
    w, grad = values((12, 40), dtype), values((12, 40), dtype, seed=1)
    scale = 0.3 + 0.01 * torch.arange(rows, dtype=torch.float32).reshape(-1, 1)
    return w, Grid(scale.reshape(1) if rows == 1 else scale, -2, 1, 0.25, rows, offset), grad, torch.empty_like(w)


WIDE = [torch.float32, torch.float64]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("rows", [1, 12, 60])
@pytest.mark.parametrize("offset", [0.0, 0.5])
@pytest.mark.parametrize("name", [name for name in native.ROWS if name != "codes"])
def test_a_kernel_is_its_formula(name, offset, rows, dtype):
    w, grid, grad, p = verbs(rows, dtype, offset)
    p.copy_(w + 0.1 * values((12, 40), dtype, seed=2))
    rows_of = {
        "write": (p,),
        "backward": (grad, p),
        "pull_back": (grad, p),
        "scale_gradient": (grad, p),
    }
    tensors = [w, *rows_of.get(name, (p, grad))]
    coefficient = torch.tensor(0.37, dtype=dtype) if name == "perturb" else None
    apart = [t.clone() for t in tensors]
    ds, far = kernels.bind(name, grid, tensors, coefficient)()
    shape = (-1,) if rows == 1 else (rows, -1)
    limits = torch.tensor([float(grid.quant_min), float(grid.quant_max), offset])
    others = [] if coefficient is None else [coefficient]
    expected, farthest = getattr(formulas, name)(
        *(t.view(shape) for t in apart), *others, grid.scale.view(-1, *[1] * (rows > 1)), limits
    )
    assert all(map(same_bits, tensors, apart))
    assert far == (0 if farthest is None else farthest.item())
    assert (ds is None) == (expected is None)
    if ds is not None:
        assert_sums_agree(ds, expected.view(-1), 2 * grad)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("rows", [1, 12])
@pytest.mark.parametrize("name", ["lsq", "stretched"])
def test_the_verbs_are_the_gradients_of_fake_quantization(name, rows, dtype):
    w, _, grad, p = verbs(rows, dtype)
    quantizer = build_quantizer(
        name,
        bits=2,
        signed=True,
        axis=None if rows == 1 else 0,
        granularity="per_tensor" if rows == 1 else "per_channel",
    )
    quantizer.observe_(w)
    grid = quantizer.grid(w)
    leaves = [w.clone().requires_grad_(), quantizer.scale]
    with using("eager"):
        q = quantizer(leaves[0])
        dw, ds = torch.autograd.grad(q, leaves, grad)
    given = grad.clone()
    assert kernels.write_([Weight(w, p, grid)]) == [True]
    assert torch.equal(p, q)
    ((found, same),) = kernels.pull_back_([Weight(w, p, grid)], [grad], overwrite=False)
    ((pulled, same_too),) = kernels.pull_back_([Weight(w, p, grid)], [grad], overwrite=True)
    assert same
    assert same_too
    assert same_bits(found, pulled)
    assert_sums_agree(found, ds, 2 * given)
    assert torch.equal(grad, dw)
    assert torch.equal(p, w)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 12])
def test_perturbing_adds_c_times_d_to_what_is_on_the_grid(rows):
    w, grid, direction, p = verbs(rows)
    version, coefficient = p._version, torch.tensor(0.37)
    kernels.write_([Weight(w, p, grid)])
    expected, kept = p + direction * coefficient, direction.clone()
    assert kernels.perturb_([Weight(w, p, grid)], [direction], [coefficient]) == [True]
    assert torch.equal(p, expected)
    assert torch.equal(direction, kept)
    assert p._version > version
    assert kernels.perturb_([Weight(w, p, grid)], [direction], [coefficient]) == [False], "p is not Q(w) now"
    assert kernels.perturb_([Weight(w, p, None)], [direction], [coefficient]) == [None]
    assert kernels.perturb_([Weight(w, p, grid)], [direction.t()], [coefficient]) == [None]


@pytest.mark.usefixtures("compiled")
def test_weights_that_fit_are_swept_and_the_others_are_left_alone():
    (w, grid, grad, p), (other, _, _, _) = verbs(1), verbs(1)
    held = torch.zeros_like(p)
    weights = [Weight(other.t(), held, grid), Weight(w, p, grid), Weight(other, held, None)]
    assert kernels.write_(weights) == [False, True, False]
    found = kernels.pull_back_(weights, [grad.t(), grad, grad.clone()], overwrite=True)
    assert [each is not None for each in found] == [False, True, False]
    assert torch.equal(p, w)
    assert not held.any()


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 4])
def test_channels_last_weights_are_swept(rows):
    shape = (4, 3, 5, 2)
    w, p, g = (values(shape, seed=i).to(memory_format=torch.channels_last) for i in range(3))
    scale = torch.full((rows, 1, 1, 1) if rows > 1 else (1,), 0.3)
    weight = Weight(w, p, Grid(scale, -2, 1, 1.0, rows))
    assert kernels.write_([weight]) == [True]
    with using("eager"):
        assert torch.equal(p, fake_quantize(w, scale, -2, 1))
    assert kernels.pull_back_([weight], [g.contiguous()], overwrite=True) == [None], "a gradient of another layout"
    assert kernels.pull_back_([weight], [g], overwrite=True)[0][1] is True
    assert torch.equal(p, w)


@pytest.mark.filterwarnings("ignore:16-bit parameters round the perturbation away")
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_train_with_kernels(dtype):
    ends = []
    for backend in ("compiled", "eager"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4)).to(dtype)
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
    needs_kernels()
    w = values((SMALLEST // 2,))
    grid = Grid(torch.full((1,), 0.1), -8, 7, 0.01, 1)
    one, none = Weight(w, torch.empty_like(w), grid), Weight(w, torch.empty_like(w), None)
    for weights, expected in (([one], [False]), ([one, none], [False, False]), ([one, one], [True, True])):
        assert kernels.write_(weights) == expected


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("rows", "entry", "expected"), [(1, 0.123, False), (12, float("inf"), False), (12, float("nan"), True)]
)
def test_one_foreign_entry_is_seen_and_nan_is_nobodys_write(rows, entry, expected):
    w, grid, grad, p = verbs(rows)
    version = p._version
    kernels.write_([Weight(w, p, grid)])
    assert p._version > version, "for autograd it is a write"
    p[3, 7] = entry
    assert kernels.pull_back_([Weight(w, p, grid)], [grad], overwrite=False)[0][1] is expected
    assert kernels.pull_back_([Weight(w, p, grid)], [grad], overwrite=True)[0][1] is expected


@pytest.mark.parametrize(
    ("method", "granularity"), list(zip(QUANTIZING, itertools.cycle(["per_tensor", "per_channel"])))
)
def test_training_agrees_between_the_back_ends(method, granularity):
    needs_kernels()
    found = []
    for backend in ("eager", "compiled"):
        with using(backend):
            model = method.model(MLP, granularity=granularity)
            optimizer = method(model, torch.optim.SGD, lr=0.05)
            train(optimizer, model, MLP, 4)
            assert_on_grid(optimizer)
            found.append(latents(optimizer, model))
    for name in found[0]:  # four steps of sums in another order
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("compiled")
def test_after_an_exception_in_the_base_the_latents_come_back():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise OSError("the base fails")

    model = CONV.quantized()
    optimizer = qsam.SAQ(model, Fails, lr=0.1)
    before = latents(optimizer, model)
    with pytest.raises(OSError, match="the base fails"):
        train(optimizer, model, CONV, 1)
    assert_on_grid(optimizer)
    weights = {slot.path for slot in optimizer._latents.slots}
    after = latents(optimizer, model)
    assert all(torch.equal(before[name], after[name]) for name in weights)


# --- the formulas through torch.compile -----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("rows", [1, 12])
def test_what_a_gpu_is_given_computes_the_same(rows, monkeypatch):
    """The path of a GPU, on the CPU: torch.compile of the formulas, in place, for any size."""
    w, grid, grad, p = verbs(rows)
    expected = [t.clone() for t in (w, grad, p)]
    weight, twin = Weight(w, p, grid), Weight(expected[0], expected[2], grid)
    step, coefficient = values((12, 40), seed=5), torch.tensor(0.37)

    def run(weight: Weight, grad: Tensor) -> list[object]:
        out, dx, ds = passed("compiled", weight.w, grid.scale, (grid.quant_min, grid.quant_max))
        assert kernels.write_([weight]) == [True]
        found = [out, dx, ds, weight.p.clone()]
        found += [bool(kernels.perturb_([weight], [step], [coefficient])[0]), weight.p.clone()]
        kernels.write_([weight])
        for overwrite in (False, True):
            ((ds, same),) = kernels.pull_back_([weight], [grad], overwrite=overwrite)
            found += [ds, bool(same)]
        return [*found, grad, weight.p]

    with using("compiled"):
        native_found = run(twin, expected[1])
        monkeypatch.setitem(kernels.BINDERS, "cpu", kernels._bind_compiled)
        found = run(weight, grad)
    for ours, theirs in zip(found, native_found, strict=True):
        if isinstance(ours, Tensor) and ours.numel() <= rows:
            torch.testing.assert_close(ours, theirs)
        else:
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


# --- choosing -----------------------------------------------------------------------------------------------------------


def test_auto_leaves_small_tensors_eager_and_fuses_large_ones():
    needs_kernels()
    grid = Grid(torch.ones(1), -8, 7, 1.0, 1)
    assert kernels.quantized(torch.ones(8, 8), grid) is None
    assert kernels.quantized(torch.ones(SMALLEST), grid) is not None
    with using("eager"):
        assert kernels.quantized(torch.ones(SMALLEST), grid) is None
    for unknown in ("inductor", None):
        with pytest.raises(ValueError, match="`backend` must be one of auto, eager, compiled, got"):
            qsam.set_backend(unknown)


@pytest.mark.usefixtures("compiled")
def test_a_compiled_model_holds_the_formulas_themselves():
    x = values((16, 32))
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    qsam.quantize_(model, rules=[("*", {})])
    qsam.calibrate(model, [x])
    expected = model(x)
    compiled = torch.compile(copy.deepcopy(model), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("rows", [1, 8])
def test_a_weight_of_another_size_is_an_error_and_writes_no_memory(rows):
    """A kernel would write as many entries as the latent has."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 4))
    qsam.quantize_(model, granularity="per_channel" if rows > 1 else "per_tensor", rules=[("*", {"activations": None})])
    optimizer = qsam.JointSAM(model, torch.optim.SGD, lr=0.1, rho=0.1)
    before = model[0].weight.data
    with pytest.raises(RuntimeError, match="size of tensor"), optimizer.latents():
        model[0].weight.data = torch.zeros(4, 4)
    assert model[0].weight.shape == (4, 4)
    model[0].weight.data = before
    grid = optimizer._latents.slots[0].quantizer.grid(before)
    weights = [Weight(before, torch.zeros(32), grid)]
    assert kernels.write_(weights) == [False]
    assert kernels.pull_back_(weights, [before], overwrite=False) == [None]


@pytest.mark.usefixtures("compiled")
def test_the_default_dtype_changes_nothing():
    w, s = values((300, 300)), torch.tensor([0.1])
    expected = fake_quantize(w, s, -8, 7, 0.01)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(fake_quantize(w, s, -8, 7, 0.01), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("shape", [(9, 20001), (16, 20000), (5, 3)])
def test_a_tensor_that_does_not_fit_its_scales_is_left_to_the_formula(shape):
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        fake_quantize(values(shape), torch.full((8, 1), 0.1), -4, 3)


def test_a_quantizer_has_a_grid_only_where_scales_belong_to_rows():
    x = values((12, 40))
    for kind, other in (
        ({"granularity": "per_group", "group_size": 8}, (12, 80)),
        ({"granularity": "per_channel"}, (6, 80)),
    ):
        q = LSQ(bits=3, axis=0, **kind)
        q.observe_(x)
        assert q.grid(x).rows == q.scale.numel()
        assert q.grid(values(other)) is None
    q = LSQ(bits=3, axis=1, granularity="per_channel")
    q.observe_(x)
    assert q.grid(x) is None


@pytest.mark.usefixtures("compiled")
def test_what_memory_does_not_tell_goes_the_eager_way():
    """A lazy negation; batched gradients; a trace and a mode, which would not see a kernel."""
    x = values((64, 64))
    q = LSQ(bits=4)
    q.observe_(x)
    q.requires_grad_(True)
    leaf = x.clone().requires_grad_()
    grads = torch.stack([values((64, 64), seed=i) for i in range(3)])
    with using("eager"):
        expected = q(-x)
        batched = torch.autograd.grad(q(leaf), (leaf, q.scale), grads, is_grads_batched=True)
    assert torch.equal(q(torch._neg_view(x)), expected)
    out = q(leaf)
    plain, negated = (torch.autograd.grad(out, leaf, g, retain_graph=True)[0] for g in (-x, torch._neg_view(x)))
    assert torch.equal(plain, negated)
    found = torch.autograd.grad(out, (leaf, q.scale), grads, is_grads_batched=True)
    for ours, theirs in zip(found, batched, strict=True):
        torch.testing.assert_close(ours, theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        traced = torch.jit.trace(q, x)
    assert torch.equal(traced(-x), expected)
    with FlopCounterMode(display=False):
        assert kernels.quantized(x, q.grid(x)) is None
        assert torch.equal(q(-x), expected)
    assert kernels.quantized(x, q.grid(x)) is not None, "nothing of this has switched the kernels off"


@pytest.mark.usefixtures("compiled")
def test_a_scale_elsewhere_or_of_another_dtype_is_not_for_a_kernel():
    x = values((64, 40))
    assert kernels.fuses(x, Grid(torch.ones(1), -8, 7, 1.0, 1))
    assert not kernels.fuses(x, Grid(torch.ones(1, device="meta"), -8, 7, 1.0, 1))
    assert not kernels.fuses(x.to("meta"), Grid(torch.ones(1, device="meta"), -8, 7, 1.0, 1))
    assert not kernels.fuses(x, Grid(torch.ones(1, dtype=torch.float64), -8, 7, 1.0, 1))
    assert not kernels.fuses(x.to(torch.complex64), Grid(torch.ones(1), -8, 7, 1.0, 1))


@pytest.mark.parametrize("backend", ["compiled", "eager"])
def test_a_second_derivative_counts_what_an_input_was_made_of_once(backend):
    """The input's history leads to the scale too."""
    needs_kernels()
    x = values((64, 40))
    q = LSQ(bits=4)
    q.observe_(x)
    q.requires_grad_(True)
    with using(backend):
        out = q(q(x.requires_grad_()).tanh() * 2)
        found = torch.autograd.grad(out.square().sum(), [x, q.scale], create_graph=True)
        expected = torch.autograd.grad(q(q(x).tanh() * 2).square().sum(), [x, q.scale])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Narrowing(LSQ):
    """A symmetric grid that gets smaller."""

    levels = 7

    @property
    def quant_min(self) -> int:
        return -self.levels

    @property
    def quant_max(self) -> int:
        return self.levels


@pytest.mark.usefixtures("compiled")
def test_a_subclass_with_limits_of_its_own_keeps_them_and_they_are_looked_up_each_time():
    x = values((64, 40))
    q = Narrowing(bits=4)
    q.observe_(x)
    for levels in (7, 1):
        q.levels = levels
        assert q.grid(x).quant_max == levels
        assert q(x).div(q.scale).round().unique().tolist() == list(range(-levels, levels + 1))


def test_no_tensor_stays_behind_after_a_step(backend="compiled"):
    needs_kernels()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    qsam.quantize_(model, bits=4, activation_bits=8)
    optimizer = qsam.SQuAT(model, torch.optim.AdamW, lr=1e-3)
    x, y = values((64, 16)), values((64, 4))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    def alive_after(steps: int) -> int:
        for _ in range(steps):
            optimizer.step(closure)
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    with using(backend):
        assert alive_after(5) >= alive_after(20)
