"""The maths of :mod:`qsam.functional` as fused kernels, each in one sweep over memory.

On a CPU the kernels are plain C (``sweeps.c``), compiled once by the system's C compiler and called through ctypes
(:mod:`qsam.fused.native`). On a GPU they are the formulas of :mod:`qsam.fused.formulas` through ``torch.compile``.
:mod:`qsam.fused.kernels` says which tensors a kernel may be given, :mod:`qsam.fused.sweeps` is what an optimizer does
to all its weights, and :mod:`qsam.fused.linear` a Linear layer that quantizes its own input.
"""
