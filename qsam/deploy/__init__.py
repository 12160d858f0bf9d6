"""Files for other runtimes that hold the trained integers: nothing is quantized again."""

from qsam.deploy.onnx import export_onnx

__all__ = ["export_onnx"]
