"""Order: see book.py."""

import qsam
from tests.wrong_calls.book import wrong


@wrong(RuntimeError, "step() found no gradient: run a new backward before each step.")
def _(optimizer):
    optimizer.step()


@wrong(TypeError, "`closure` must be a function that returns the loss, got 3.")
def _(optimizer):
    optimizer.step(3)


@wrong(RuntimeError, "step_scales() found no gradient: run a backward inside `with optimizer.scale_phase():` before.")
def _(optimizer):
    optimizer.step_scales()


@wrong(
    RuntimeError,
    "perturbed() needs gradients of a first pass: run backward inside `with optimizer.first_pass():` before.",
)
def _(optimizer):
    optimizer.perturbed().__enter__()


@wrong(RuntimeError, "QAT has no perturbed pass: run one backward, then step().")
def _(qat):
    qat.perturbed().__enter__()


@wrong(RuntimeError, "QAT steps weights and scales together: scale_phase() belongs to SQuAT.")
def _(qat):
    qat.scale_phase().__enter__()


@wrong(RuntimeError, "QAT steps weights and scales together: step_scales() belongs to SQuAT.")
def _(qat):
    qat.step_scales()


@wrong(
    RuntimeError,
    "perturbed() needs gradients of a first pass: run backward inside `with optimizer.first_pass():` before.",
)
def _(optimizer, closure):
    closure()
    optimizer.perturbed().__enter__()


@wrong(RuntimeError, "step() inside the block first_pass(): leave the block first.")
def _(optimizer, closure):
    optimizer.step(lambda: optimizer.step(closure))


@wrong(RuntimeError, "state_dict() inside the block first_pass(): leave the block first.")
def _(optimizer):
    optimizer.step(optimizer.state_dict)


@wrong(RuntimeError, "sync_latents() inside the block first_pass(): leave the block first.")
def _(optimizer):
    optimizer.step(optimizer.sync_latents)


@wrong(RuntimeError, "dequantize_() inside the block first_pass(): leave the block first.")
def _(optimizer, quantized):
    optimizer.step(lambda: qsam.dequantize_(quantized, optimizer))


@wrong(RuntimeError, "sharpness() inside the block first_pass(): leave the block first.")
def _(optimizer, closure):
    optimizer.step(lambda: qsam.sharpness(optimizer, closure, progress=False))


@wrong(
    RuntimeError,
    "the quantized weight '0.weight' was written by somebody else since the last step. If that was "
    "meant (a checkpoint, a merge), call optimizer.sync_latents() to take the present weights as "
    "latents.",
)
def _(optimizer, closure, quantized):
    quantized[0].weight.data = quantized[0].weight.data * 2
    optimizer.step(closure)


@wrong(
    RuntimeError,
    "the quantizers that this optimizer was built on have been taken off its model (dequantize_): "
    "it can no longer be used. Build a new one; to keep its full-precision weights, call "
    "qsam.dequantize_(model, optimizer), with the optimizer.",
)
def _(optimizer, closure, quantized):
    qsam.dequantize_(quantized)
    optimizer.step(closure)


@wrong(
    RuntimeError,
    "the quantizers that this optimizer was built on have been taken off its model (dequantize_): "
    "it can no longer be used. Build a new one; to keep its full-precision weights, call "
    "qsam.dequantize_(model, optimizer), with the optimizer.",
)
def _(optimizer, closure, quantized):
    qsam.dequantize_(quantized, optimizer)
    optimizer.step(closure)


@wrong(
    RuntimeError,
    "the quantizers that this optimizer was built on have been taken off its model (dequantize_): "
    "it can no longer be used. Build a new one; to keep its full-precision weights, call "
    "qsam.dequantize_(model, optimizer), with the optimizer.",
)
def _(optimizer, quantized):
    qsam.dequantize_(quantized)
    qsam.quantize_(quantized)
    optimizer.sync_latents()


@wrong(
    RuntimeError,
    "the quantizers that this optimizer was built on have been taken off its model (dequantize_): "
    "it can no longer be used. Build a new one; to keep its full-precision weights, call "
    "qsam.dequantize_(model, optimizer), with the optimizer.",
)
def _(optimizer, quantized):
    qsam.dequantize_(quantized, optimizer)
    optimizer.state_dict()
