"""The maths of :mod:`qsam.functional` as fused kernels, each one sweep over memory.

On a CPU the kernels are plain C (``sweeps.c``), compiled once by the system's C compiler and called through ctypes
(:mod:`qsam.fused.native`). On a GPU they are the formulas of :mod:`qsam.fused.formulas` through ``torch.compile``.
:mod:`qsam.fused.kernels` chooses the back end and runs the verbs of an optimizer on all its weights;
:mod:`qsam.fused.linear` is a Linear layer that quantizes its own input.
"""
