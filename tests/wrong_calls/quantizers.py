"""Quantizers: see book.py."""

import qsam
import qsam.testing
from qsam.optim import DIRECTIONS, OPTIMIZERS
from qsam.quantizers import LSQ
from tests.wrong_calls.book import wrong


@wrong(TypeError, "A quantizer's name must be a non-empty string, got ''.")
def _():
    qsam.register_quantizer("")


@wrong(TypeError, "A quantizer's name must be a non-empty string, got 3.")
def _():
    qsam.register_quantizer(3)


@wrong(ValueError, "The quantizer name 'lsq' is taken by qsam.quantizers.lsq.LSQ: choose another.")
def _():
    qsam.register_quantizer("lsq")(LSQ)


@wrong(TypeError, "a quantizer must be a subclass of qsam.Quantizer, got <class 'dict'>.")
def _():
    qsam.register_quantizer("mine")(dict)


@wrong(TypeError, "the quantizer Mine does not implement init_ and forward.")
def _():
    qsam.register_quantizer("mine")(type("Mine", (qsam.Quantizer,), {}))


@wrong(ValueError, "`bits` must be an integer in [2, 8], got 0. To keep a tensor in float, give None.")
def _():
    LSQ(bits=0)


@wrong(ValueError, "granularity 'per_channel' needs `axis`, the channel dimension; activations are per_tensor.")
def _():
    LSQ(bits=4, granularity="per_channel")


@wrong(ValueError, "`granularity` must be one of per_tensor, per_channel, per_group, got 'rows'.")
def _():
    LSQ(bits=4, granularity="rows")


@wrong(ValueError, "There is no optimizer 'squad'. Did you mean 'squat' or 'saq' or 'sam'?")
def _():
    OPTIMIZERS.get("squad")


@wrong(ValueError, "There is no direction 3. Registered: asam, friendly, grid, momentum, previous, random, sam.")
def _():
    DIRECTIONS.get(3)


@wrong(ValueError, "There is no quantizer 'lsk'. Did you mean 'lsq'?")
def _():
    qsam.testing.check_quantizer("lsk")


@wrong(TypeError, "`name_or_class` must be a registered name or a qsam.Quantizer class, got 3.")
def _():
    qsam.testing.check_quantizer(3)


@wrong(
    ValueError,
    "There is no law 'idempotence'. Did you mean 'idempotent' or 'monotone' or 'deterministic'? See qsam.testing.LAWS.",
)
def _():
    qsam.testing.check_quantizer("lsq", bits=4, laws=["idempotence"])


@wrong(AssertionError, "LSQ refused every setting with ValueError: there was nothing to check.")
def _():
    qsam.testing.check_quantizer("lsq", bits=1)


@wrong(ValueError, "`bits`, `signed`, `granularities` and `axes` leave no setting to check.")
def _():
    qsam.testing.check_quantizer("lsq", bits=[])
