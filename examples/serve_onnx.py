"""Answer from an exported encoder with onnxruntime and tokenizers alone: neither torch nor qsam is imported.

    python -m qsam.deploy runs/glue/stsb-recommended-w2a8-seed0 --to onnx --out model.onnx
    python examples/serve_onnx.py model.onnx runs/glue/stsb-recommended-w2a8-seed0/model/tokenizer.json \
        "A man plays a guitar." "Somebody makes music."

One text or two are one row; the answer is the model's first output, a score or one logit per class.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Encoder:
    """An exported model with its tokenizer."""

    def __init__(self, model: str, tokenizer: str) -> None:
        self.session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(tokenizer)
        self.tokenizer.enable_padding()

    def __call__(self, rows: Sequence[Sequence[str]]) -> np.ndarray:
        """Return one row of outputs per row of one text or two."""
        encoded = self.tokenizer.encode_batch([row[0] if len(row) == 1 else tuple(row) for row in rows])
        fields = {
            "input_ids": [e.ids for e in encoded],
            "attention_mask": [e.attention_mask for e in encoded],
            "token_type_ids": [e.type_ids for e in encoded],
        }
        wanted = [given.name for given in self.session.get_inputs()]
        found: np.ndarray = self.session.run(None, {name: np.array(fields[name]) for name in wanted})[0]
        return found


def main() -> None:
    """Read the command line and print the outputs."""
    if len(sys.argv) not in {4, 5}:
        raise SystemExit("usage: serve_onnx.py MODEL.onnx tokenizer.json TEXT [SECOND TEXT]")
    print(*Encoder(*sys.argv[1:3])([sys.argv[3:]])[0])


if __name__ == "__main__":
    main()
