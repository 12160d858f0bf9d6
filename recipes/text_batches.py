"""Rows of text as padded batches of tokens, in an order that is known from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from recipes.glue_tasks import Row, Task

CHUNK = 50
"""Batches that are sorted by length together: most of the padding goes, most of the randomness stays."""


@dataclass(frozen=True)
class Encoded:
    """Tokenized rows.

    Attributes:
        columns: what the model's forward takes, by name: one list of integers a row, not padded.
        padding: the value that each column is padded with.
        labels: one a row; fp32 scores, or int64 class indices.
    """

    columns: dict[str, list[list[int]]]
    padding: dict[str, int]
    labels: Tensor

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row."""
        return np.array([len(tokens) for tokens in self.columns["input_ids"]])

    def batch(self, rows: Sequence[int], device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
        """Return the named rows, padded to the longest of them, and their labels."""
        inputs = {
            name: pad_sequence(
                [torch.tensor(values[row]) for row in rows], batch_first=True, padding_value=self.padding[name]
            ).to(device)
            for name, values in self.columns.items()
        }
        return inputs, self.labels[list(rows)].to(device)


def encode(tokenizer: Any, rows: Sequence[Row], max_length: int, task: Task) -> Encoded:
    """Tokenize rows.

    Args:
        tokenizer: a tokenizer of transformers.
        rows: the rows; all of them with one text, or all with two.
        max_length: longer rows are cut to this many tokens, the longer text first.
        task: says whether the labels are scores or classes.

    Returns:
        The tokens and labels, in the order of the rows.
    """
    texts = [[row.text_a for row in rows]]
    if rows[0].text_b is not None:
        texts.append([row.text_b or "" for row in rows])
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id, "attention_mask": 0}
    labels = torch.tensor([row.label for row in rows], dtype=torch.float32 if task.is_regression else torch.int64)
    return Encoded(columns, padding, labels)


def epoch_batches(lengths: np.ndarray, batch_size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of one epoch: shuffled, then sorted by length within chunks of 50 batches, then shuffled.

    Args:
        lengths: number of tokens of each row, shape `(rows,)`.
        batch_size: rows a batch; the last of them may be smaller.
        seed: the run's seed.
        epoch: the epoch, from 0: every epoch has another order.

    Returns:
        Row numbers, one list a batch; each row is in exactly one.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), CHUNK * batch_size):
        chunk = order[start : start + CHUNK * batch_size]
        by_length = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches += [by_length[i : i + batch_size].tolist() for i in range(0, len(by_length), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def sorted_batches(lengths: np.ndarray, batch_size: int) -> Iterator[list[int]]:
    """Yield all rows in batches of similar length, for an evaluation."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size].tolist()
