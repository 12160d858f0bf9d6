"""Accelerate: call `prepare` as usual, and call the blocks on the optimizer inside.

python examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import qsam


def main() -> dict[str, float]:
    """Train with accumulation and bf16, save and load the state; return the first and the last loss."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    rows = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16, shuffle=True)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = qsam.SQuAT(model, AdamW, lr=5e-3, rho=0.1, schedule="next_batch", max_grad_norm=1.0)  # qsam

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    model, optimizer, rows = accelerator.prepare(model, optimizer, rows)
    inner = qsam.unwrap(optimizer)  # qsam: the blocks are called on it
    losses = []
    for _ in range(4):
        for inputs, targets in rows:
            with accelerator.accumulate(model):
                for number, block in enumerate(inner.blocks):  # qsam: ("scale_phase",) in every second step
                    with getattr(inner, block)():  # qsam
                        loss = nn.functional.cross_entropy(model(inputs), targets)
                        accelerator.backward(loss)
                    if number == 0:
                        losses.append(loss.item())
                optimizer.step()  # Accelerate skips this call between the micro-batches
                optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)  # restores latents, scales, moments and the place in the alternation
    return {"first": losses[0], "last": sum(losses[-4:]) / 4}


if __name__ == "__main__":
    print(main())
