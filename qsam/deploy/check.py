"""Does a runtime compute what the model computes? The model's own noise is the measure.

Fake quantization is discontinuous: rounding errors of the arithmetic flip codes, so torch in fp32 disagrees with torch
in fp64. A runtime passes if its mean difference from torch is at most ``factor`` times that.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qsam.batches import in_eval_mode, refuse_empty, require_batches
from qsam.coverage import require_coverage
from qsam.deploy.onnx import require
from qsam.layers import unwrap_model

Runtime = Callable[[Any], Any]
Metric = Callable[[list[Any]], float]

INTEGER = (
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "QLinearMatMul",
    "QGemm",
    "QLinearConv",
    "ConvInteger",
    "MatMulNBits",
)
FLOAT = ("MatMul", "Gemm", "FusedMatMul", "FusedGemm", "Conv", "FusedConv", "ConvTranspose")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Report:
    """Differences of a runtime from the model, in the unit of the outputs.

    Attributes:
        mean: Mean of ``|runtime - torch fp32|``.
        largest: The largest of them.
        noise: Mean of ``|torch fp64 - torch fp32|``; at least one rounding of the mean output in fp32.
        factor: How many times the noise is allowed.
        metric: The metric of the model and that of the runtime, or None.
        operators: How often each operator stands in the graph that runs; empty where the runtime does not tell.
        fallback: Products of trained integers that run in float, by name.
    """

    mean: float
    largest: float
    noise: float
    factor: float
    metric: tuple[float, float] | None
    operators: Mapping[str, int]
    fallback: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the mean difference is at most ``factor`` times the noise."""
        return self.mean <= self.factor * self.noise

    def __str__(self) -> str:
        """Return the report, one fact per line."""
        lines = [
            f"difference   mean {self.mean:.3g}, largest {self.largest:.3g}",
            f"own noise    mean {self.noise:.3g} (torch fp64 against fp32)",
            f"verdict      {'passed' if self.passed else 'FAILED'}: {self.mean / self.noise:.2f} times the noise, "
            f"{self.factor:g} allowed",
        ]
        if self.metric is not None:
            lines.append(f"metric       model {self.metric[0]:.6g}, runtime {self.metric[1]:.6g}")
        if self.operators:
            run = ", ".join(f"{self.operators[name]} {name}" for name in INTEGER if self.operators.get(name))
            lines.append(f"integers     {run or 'no operator'}")
            lines.append(f"in float     {', '.join(self.fallback) or 'no product of trained integers'}")
        return "\n".join(lines)


class OnnxRuntime:
    """An ONNX file in onnxruntime on the processor: ``batch -> array``; made by :func:`onnx_runtime`.

    Attributes:
        session: The onnxruntime.InferenceSession.
        operators: How often each operator stands in the optimized graph.
        fallback: Float products whose weight is a DequantizeLinear, by name.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int, config: Mapping[str, str]) -> None:
        runtime, onnx = require("onnxruntime"), require("onnx")
        options = runtime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, threads
        for key, value in config.items():
            options.add_session_config_entry(key, value)
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self.session = runtime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
            graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        self.operators: Counter[str] = Counter(node.op_type for node in graph.node)
        held = {tensor.name for tensor in graph.initializer}
        weights = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in held}
        self.fallback = tuple(n.name for n in graph.node if n.op_type in FLOAT and weights & set(n.input))

    def __call__(self, batch: Any) -> Any:
        """Return the ``logits``, or the first output where none is called so."""
        names = [given.name for given in self.session.get_inputs()]
        if isinstance(batch, Mapping):
            feed = {name: _array(batch[name]) for name in names}
        else:
            parts = batch if isinstance(batch, tuple | list) else (batch,)
            feed = {name: _array(part) for name, part in zip(names, parts, strict=False)}
        outputs = [out.name for out in self.session.get_outputs()]
        return self.session.run(["logits" if "logits" in outputs else outputs[0]], feed)[0]


def onnx_runtime(
    path: str | os.PathLike[str], threads: int = 1, config: Mapping[str, str] | None = None
) -> OnnxRuntime:
    """Return an ONNX file as a function ``batch -> array`` that runs in onnxruntime.

    Args:
        path: The file.
        threads: Of one operator.
        config: Entries of onnxruntime's session configuration.

    Raises:
        ImportError: onnx or onnxruntime is missing.
    """
    return OnnxRuntime(path, threads, config or {})


@torch.no_grad()
def check(
    model: nn.Module, runtime: Runtime, batches: Iterable[Any], metric: Metric | None = None, factor: float = 2.0
) -> Report:
    """Compare a runtime with the model that was exported.

    Args:
        model: The quantized model, in fp32.
        runtime: ``batch -> array``: :func:`onnx_runtime`, or a function of yours.
        batches: A dict is given to the model as keywords, a tuple or list as arguments, anything else as one.
        metric: A function of the list of outputs, one array per batch, in order.
        factor: How many times the model's own noise is allowed. OpenVINO, whose arithmetic differs more, needs 4.

    Returns:
        The report; ``print`` shows it, ``passed`` is the verdict.

    Raises:
        RuntimeError: the model is not quantized.
        TypeError: ``batches`` cannot be iterated over.
        ValueError: there is no batch, or the runtime's output has another shape.
    """
    require_coverage(model, "check")
    require_batches(batches)
    plain = unwrap_model(model)
    wide = copy.deepcopy(plain).double().eval()
    ours, theirs, total, largest, noise, size, count = [], [], 0.0, 0.0, 0.0, 0.0, 0
    with in_eval_mode(plain):
        for batch in batches:
            expected = _output(plain, batch).float().cpu()
            exact = _output(wide, _double(batch)).cpu()
            found = torch.as_tensor(runtime(batch)).float()
            if found.shape != expected.shape:
                raise ValueError(
                    f"the runtime returned the shape {tuple(found.shape)}, the model {tuple(expected.shape)}."
                )
            difference = (found - expected).abs()
            total, largest = total + float(difference.double().sum()), max(largest, float(difference.max()))
            noise += float((exact - expected).abs().sum())
            size, count = size + float(expected.double().abs().sum()), count + expected.numel()
            ours.append(expected.numpy())
            theirs.append(found.numpy())
    refuse_empty(count, "check")
    return Report(
        mean=total / count,
        largest=largest,
        noise=max(noise, size * torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny) / count,
        factor=factor,
        metric=None if metric is None else (float(metric(ours)), float(metric(theirs))),
        operators=dict(getattr(runtime, "operators", {})),
        fallback=tuple(getattr(runtime, "fallback", ())),
    )


def _array(value: Any) -> Any:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def _double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _double(part) for key, part in value.items()}
    return type(value)(map(_double, value)) if type(value) in (tuple, list) else value


def _output(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        out = model(**batch)
    else:
        out = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    if isinstance(out, Mapping):
        out = out["logits"] if "logits" in out else next(iter(out.values()))
    found = out[0] if isinstance(out, tuple | list) else out
    assert isinstance(found, Tensor)
    return found
