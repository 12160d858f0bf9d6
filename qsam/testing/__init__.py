"""The laws of a quantizer, for the quantizers of other packages: ``check_quantizer`` checks them all.

    import qsam.testing

    def test_mine():
        qsam.testing.check_quantizer("mine")

A law is a small function of a :class:`Case`; :data:`LAWS` maps names to laws. Some apply to every quantizer. Those of a
uniform grid apply to quantizers with ``scale`` and ``codes``, those of the scale's gradient to quantizers whose
``scale`` is a Parameter, and those of noise to quantizers that hold a stream of noise.
"""

from qsam.testing.check import check_quantizer
from qsam.testing.inputs import Case
from qsam.testing.laws import LAWS, Law

__all__ = ["LAWS", "Case", "Law", "check_quantizer"]
