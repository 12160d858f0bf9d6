"""The Hugging Face Trainer with a mixin and one keyword.

python examples/trainer.py
"""

import functools
import tempfile

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import qsam
from qsam.integrations.trainer import TrainerMixin  # qsam


class QsamTrainer(TrainerMixin, Trainer):  # qsam
    """A Trainer that runs all passes of a step."""


class Sentences(Dataset):
    """Random tokens, labelled by the parity of the first token."""

    def __init__(self, rows: int) -> None:
        self.ids = torch.randint(1, 40, (rows, 10), generator=torch.Generator().manual_seed(rows))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "attention_mask": torch.ones(10).long(), "labels": self.ids[row, 0] % 2}


def main() -> dict[str, float]:
    """Train with accumulation and bf16 autocast, save the model and rebuild it; return the logged losses."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    )
    qsam.quantize_(model, bits=4, activation_bits=8)  # qsam
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            num_train_epochs=4,
            learning_rate=5e-3,
            max_grad_norm=1.0,  # passed to the optimizer, which clips the pulled-back gradients
            bf16=True,
            use_cpu=True,
            logging_steps=4,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = QsamTrainer(
            model,
            arguments,
            train_dataset=Sentences(128),
            qsam_method=functools.partial(qsam.SQuAT, rho=0.05),  # qsam: wraps the Trainer's own AdamW
        )
        trainer.train()
        trainer.save_model(folder)  # writes qsam.json and qsam.safetensors too
        deployed = BertForSequenceClassification.from_pretrained(folder)
        qsam.quantize_(deployed, spec=folder)  # qsam
        batch = {key: value[None] for key, value in Sentences(1)[0].items()}
        with torch.no_grad():
            expected, got = (m.eval()(**batch).logits.float() for m in (model, deployed))
        assert torch.allclose(expected, got, atol=0.05)  # the Trainer's model still computes in bf16 autocast
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {"first": logs[0]["loss"], "last": logs[-1]["loss"], "rise": logs[-1]["qsam_rise"]}


if __name__ == "__main__":
    print(main())
