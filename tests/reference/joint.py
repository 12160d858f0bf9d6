"""Joint SAM: SAQ without the clip mask on dw."""

from tests.reference.saq import SAQ


class JointSAM(SAQ):
    masked = False
