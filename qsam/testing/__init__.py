"""The laws of a quantizer, for the quantizers of other packages: ``check_quantizer`` asks them all.

    import qsam.testing

    def test_mine():
        qsam.testing.check_quantizer("mine")

A law is a small named function of a :class:`Case`; :data:`LAWS` maps names to laws. The universal ones are asked of
every quantizer, those of a uniform grid where it shows ``scale`` and ``codes``, those of the scale's gradient
where ``scale`` is a Parameter, and those of noise where it holds a stream of noise.
"""

from qsam.testing import grid, noise, slopes, universal  # noqa: F401  (importing them fills LAWS)
from qsam.testing.case import Case
from qsam.testing.check import check_quantizer
from qsam.testing.table import LAWS, Law

__all__ = ["LAWS", "Case", "Law", "check_quantizer"]
