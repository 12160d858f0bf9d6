"""What the tests of recipes/vision.py have in common: the arguments of a tiny run on the digits."""

from pathlib import Path

TRAIN = 60


def words(out: Path, *more: object, steps: int = 4, **changes: object) -> list[str]:
    settings = {"data": "digits", "output-dir": out, "max-steps": steps, "batch-size": 20, "train-rows": TRAIN}
    settings |= {"threads": 1, "precision": "fp32", "lr": 0.01, "epochs": 100, "fp32-epochs": 100} | changes
    return [*(str(word) for name, value in settings.items() for word in (f"--{name}", value)), *map(str, more)]
