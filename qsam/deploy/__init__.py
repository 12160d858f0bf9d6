"""Files for other runtimes that hold the trained integers: nothing is quantized again."""

from qsam.deploy.check import check, onnx_runtime
from qsam.deploy.onnx import export_onnx

__all__ = ["check", "export_onnx", "onnx_runtime"]
