"""A plain PyTorch loop with all passes by hand: any method and schedule, micro-batches, GradScaler, a scheduler.

python examples/by_hand.py
"""

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

import qsam

STEPS, MICRO_BATCHES, SIZE = 30, 2, 32


def batches(number: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the micro-batches of a step. The class of a vector is the index of the largest of four entries."""
    x = torch.randn(MICRO_BATCHES, SIZE, 16, generator=torch.Generator().manual_seed(number))
    return [(part, part[:, :4].argmax(1)) for part in x]


def main() -> dict[str, float]:
    """Train, and return the first and the last loss of the weights that will be deployed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = qsam.SQuAT(model, AdamW, lr=5e-3, rho=0.1, max_grad_norm=1.0)  # qsam
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    losses = []

    def backward(x: torch.Tensor, y: torch.Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y) / MICRO_BATCHES
        scaler.scale(loss).backward()
        return loss.item()

    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for x, y in batches(step):
            for number, block in enumerate(optimizer.blocks):  # qsam: ("first_pass", "perturbed")
                with getattr(optimizer, block)():  # qsam
                    loss = backward(x, y)
                total += loss if number == 0 else 0.0
        scaler.step(optimizer)  # steps the weights
        if optimizer.scales_due:  # qsam: SQuAT's scales, on the same batch, unperturbed
            for x, y in batches(step):
                with optimizer.scale_phase():  # qsam
                    backward(x, y)
            scaler.step(optimizer.scales)  # qsam
        scaler.update()
        scheduler.step()
        losses.append(total)
    assert len(model[0].weight.unique()) <= 16  # the model always holds its 4-bit weights
    return {"first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    print(main())
