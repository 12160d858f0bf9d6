"""Lightning: return the optimizer from ``configure_optimizers``. With the mixin the logs are those of the first pass.

python examples/lightning_loop.py
"""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

import qsam
from qsam.integrations.lightning import LightningMixin  # qsam


class Classifier(LightningMixin, LightningModule):  # qsam
    """Predicts which of the first four entries is the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        qsam.quantize_(self.model, bits=4)  # qsam: in __init__, so that a checkpoint finds its scales
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss; Lightning calls this once per pass."""
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.model(inputs), targets)
        self.log("loss", loss)
        return loss

    def on_train_batch_end(self, outputs: dict[str, Tensor], *_: object) -> None:
        """Keep the loss of the first pass."""
        self.losses.append(float(outputs["loss"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return qsam.SQuAT(self.model, AdamW, lr=5e-3, rho=0.1)  # qsam


def main() -> dict[str, float]:
    """Train in bf16-mixed; return the first and the last loss, and the rise of the loss by the last perturbation."""
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    rows = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16, shuffle=True)
    module = Classifier()
    trainer = Trainer(
        max_epochs=3,
        precision="bf16-mixed",
        gradient_clip_val=1.0,  # passed to the optimizer, which clips the pulled-back gradients
        accelerator="cpu",
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, rows)
    rise = float(trainer.callback_metrics["qsam_rise"])
    return {"first": module.losses[0], "last": module.losses[-1], "rise": rise}


if __name__ == "__main__":
    print(main())
