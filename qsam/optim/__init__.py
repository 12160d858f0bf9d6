"""The methods, one file each, and their directions; importing this package registers them."""

from qsam.optim.directions import DIRECTIONS, Direction, register_direction
from qsam.optim.joint import JointSAM
from qsam.optim.optimizer import OPTIMIZERS, QuantizedOptimizer, register_optimizer
from qsam.optim.qat import QAT
from qsam.optim.sam import SAM
from qsam.optim.saq import SAQ
from qsam.optim.squat import SQuAT
from qsam.optim.wrappers import unwrap

__all__ = [
    "DIRECTIONS",
    "OPTIMIZERS",
    "QAT",
    "SAM",
    "SAQ",
    "Direction",
    "JointSAM",
    "QuantizedOptimizer",
    "SQuAT",
    "register_direction",
    "register_optimizer",
    "unwrap",
]
