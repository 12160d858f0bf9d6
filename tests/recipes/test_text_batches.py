import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recipes.text_batches import CHUNK, Encoded, epoch_batches, sorted_batches

LENGTHS = st.lists(st.integers(1, 128), min_size=1, max_size=300).map(np.array)


@given(LENGTHS, st.integers(1, 40), st.integers(0, 5), st.integers(0, 5))
def test_an_epoch_has_each_row_once_and_its_order_is_known(
    lengths: np.ndarray, batch_size: int, seed: int, epoch: int
) -> None:
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert max(map(len, batches)) <= batch_size
    assert batches == epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    lengths = np.arange(200)
    orders = {str(epoch_batches(lengths, 8, seed=seed, epoch=epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_chunk_is_bucketed_by_length() -> None:
    lengths = np.random.default_rng(0).permutation(CHUNK * 4)
    batches = epoch_batches(lengths, 4, seed=0, epoch=0)
    assert all(np.ptp(lengths[batch]) == 3 for batch in batches)  # one chunk: batches of neighbours
    assert [min(lengths[batch]) for batch in batches] != sorted(min(lengths[batch]) for batch in batches)


@given(LENGTHS, st.integers(1, 40))
def test_an_evaluation_has_each_row_once_sorted_by_length(lengths: np.ndarray, batch_size: int) -> None:
    rows = [row for batch in sorted_batches(lengths, batch_size) for row in batch]
    assert sorted(rows) == list(range(len(lengths)))
    assert (np.diff(lengths[rows]) >= 0).all()


def test_a_batch_is_padded_to_its_longest_row() -> None:
    columns = {"input_ids": [[5], [5, 6, 7], [5, 6]], "attention_mask": [[1], [1, 1, 1], [1, 1]]}
    encoded = Encoded(columns, {"input_ids": 9, "attention_mask": 0}, torch.tensor([0.0, 1.0, 2.0]))
    inputs, labels = encoded.batch([2, 0], torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[5, 6], [5, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert labels.tolist() == pytest.approx([2.0, 0.0], abs=0)
    assert encoded.lengths.tolist() == [1, 3, 2]
