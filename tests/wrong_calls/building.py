"""Building: see book.py."""

import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, SparseAdam

import qsam
from tests.wrong_calls.book import wrong


@wrong(TypeError, "`model` must be a torch.nn.Module, got type: the model comes first, then the optimizer.")
def _(quantized):
    qsam.QAT(Adam, quantized)


@wrong(TypeError, "`base` must be an optimizer class or instance, got 'adam'.")
def _(quantized):
    qsam.QAT(quantized, "adam", lr=0.1)


@wrong(TypeError, "`base` must be an optimizer class or instance, got 0.1.")
def _(quantized):
    qsam.QAT(quantized, 0.1)


@wrong(TypeError, "`base` must be an optimizer class or instance, got <class 'dict'>.")
def _(quantized):
    qsam.QAT(quantized, dict, lr=0.1)


@wrong(TypeError, "neither QAT nor SGD has an argument 'lrr'. Did you mean 'lr'?")
def _(quantized):
    qsam.QAT(quantized, SGD, lrr=0.1)


@wrong(ValueError, "Invalid learning rate: -1.0")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=-1.0)


@wrong(TypeError, "QAT was given an optimizer instance, which has its own groups and settings: drop ['lr'].")
def _(quantized):
    qsam.QAT(quantized, SGD(quantized.parameters(), lr=0.1), lr=0.1)


@wrong(TypeError, "QAT has no perturbation and takes no ['rho']: use SAQ or SQuAT, or drop them.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, rho=0.1)


@wrong(ValueError, "`ste` must be 'clipped' or 'identity', got 'clip'.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, ste="clip")


@wrong(ValueError, "`max_grad_norm` must be > 0, got 0.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, max_grad_norm=0)


@wrong(TypeError, "`max_grad_norm` must be None or a number > 0, got '1'.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, max_grad_norm="1")


@wrong(ValueError, "`scale_lr` must be finite and >= 0, got -1.0.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, scale_lr=-1.0)


@wrong(TypeError, "`scale_lr` must be None, a number or a pair (weights, activations), got 'auto'.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, scale_lr="auto")


@wrong(TypeError, "`scale_lr` must be None, a number or a pair (weights, activations), got (0.1, 0.1, 0.1).")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, scale_lr=(0.1, 0.1, 0.1))


@wrong(TypeError, "`scale_optimizer` must be a torch Optimizer class, got 'sgd'.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, scale_optimizer="sgd")


@wrong(ValueError, "scale_lr=None (balanced rates) goes with SGD; give `scale_lr` a number for Adam.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, scale_optimizer=Adam)


@wrong(
    RuntimeError,
    "the quantized weight '0.weight' is in no parameter group of the base optimizer: add it, or "
    "freeze it with requires_grad_(False).",
)
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, params=[quantized[0].bias])


@wrong(TypeError, "`params` must be parameters or groups of them, got 3.")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, params=3)


@wrong(ValueError, "optimizer got an empty parameter list")
def _(quantized):
    qsam.QAT(quantized, SGD, lr=0.1, params=[])


@wrong(
    TypeError,
    "SparseAdam steps on sparse gradients only, and the gradient of a quantized weight is dense: use Adam.",
)
def _(quantized):
    qsam.QAT(quantized, SparseAdam, lr=0.1)


@wrong(TypeError, "LBFGS calls its closure by itself, as often as it likes, so SAQ cannot order its passes: use QAT.")
def _(quantized):
    qsam.SAQ(quantized, LBFGS)


@wrong(ValueError, "`rho` must be finite and >= 0, got -0.1.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, rho=-0.1)


@wrong(ValueError, "`rho` must be finite and >= 0, got nan.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, rho=float("nan"))


@wrong(TypeError, "`rho` must be a number >= 0, got '0.1'.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, rho="0.1")


@wrong(ValueError, "`rng` must be 'shared' or 'independent', got 'same'.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, rng="same")


@wrong(ValueError, "There is no direction 'sma'. Did you mean 'sam'?")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, direction="sma")


@wrong(ValueError, "There is no direction None. Registered: asam, friendly, grid, momentum, previous, random, sam.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, direction=None)


@wrong(ValueError, "`perturb` must be 'quantized', 'all' or a predicate (name, parameter), got 'weights'.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, perturb="weights")


@wrong(ValueError, "`every` must be an integer >= 1, got 0.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, every=0)


@wrong(TypeError, "`every` must be an integer >= 1, got 1.5.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, every=1.5)


@wrong(ValueError, "`start` must be an integer >= 0, got -1.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, start=-1)


@wrong(ValueError, "`reuse` must be None or 'perturbation', got 'gradient'.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, reuse="gradient")


@wrong(ValueError, "`perturbation_scope` must be 'global' or 'rank', got 'ranks'.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, perturbation_scope="ranks")


@wrong(ValueError, "`case` must be 1, 2 or 3, got 4.")
def _(quantized):
    qsam.SAQ(quantized, SGD, lr=0.1, case=4)


@wrong(ValueError, "`rho` must be finite and >= 0, got -1.")
def _(quantized):
    qsam.SAQ(
        quantized,
        SGD,
        lr=0.1,
        params=[{"params": [p for n, p in quantized.named_parameters() if "scale" not in n], "rho": -1}],
    )


@wrong(ValueError, "`schedule` must be one of same_batch, next_batch, fused, got 'three'.")
def _(quantized):
    qsam.SQuAT(quantized, SGD, lr=0.1, schedule="three")


@wrong(ValueError, "`period` must be an integer >= 1, got 0.")
def _(quantized):
    qsam.SQuAT(quantized, SGD, lr=0.1, period=0)


@wrong(TypeError, "`period` must be an integer >= 1, got '2'.")
def _(quantized):
    qsam.SQuAT(quantized, SGD, lr=0.1, period="2")


@wrong(
    ValueError,
    "schedule='fused' takes the scales' gradient from the first pass, which a direction of one pass lacks.",
)
def _(quantized):
    qsam.SQuAT(quantized, SGD, lr=0.1, schedule="fused", direction="previous")


@wrong(RuntimeError, "SAM trains a float model, and this one is quantized: use JointSAM or SAQ, or dequantize_ it.")
def _(quantized):
    qsam.SAM(quantized, SGD, lr=0.1)


@wrong(ValueError, "SAM has no quantized weights: `perturb` must be 'all' or a predicate (name, parameter).")
def _(model):
    qsam.SAM(model, SGD, lr=0.1, perturb="quantized")


@wrong(
    RuntimeError,
    "another qsam optimizer owns the weights of this model: call its release() first, which hands the model over with "
    "its scales and latents, or qsam.dequantize_(model, optimizer), which takes the quantizers off.",
)
def _(optimizer, quantized):
    qsam.QAT(quantized, SGD, lr=0.1)


@wrong(ValueError, "`rho` must be finite and >= 0, got -1.0.")
def _(optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "rho": -1.0})
