"""BERT without training text: a quantized student learns from its teacher on inputs that a generator makes.

    python -m recipes.zero_shot --task stsb --bits 2 --seed 0 1 2
    python -m recipes.zero_shot --task cola --glue-dir GLUE --method saq:bits=4 saq:bits=2 --tokens soft

A method is written as in the other recipes, with the source of its inputs after an `@`:

    saq                 SAM-SGA: a sharpness-aware student, a generator that ascends
    lsq                 the same with plain Adam in place of SAM
    saq@frozen          the generator as it was at the start
    lsq@random          random tokens
    lsq@real            the training rows and their labels: the ceiling
    rtn                 rounding to nearest, input scales calibrated on random tokens
    rtn:activations=per_token                       the same with scales that need no calibration

The full-precision run of each seed, which sees the training rows, is the teacher. Task, metrics and rows to measure on
are those of `recipes/bert_glue.py`, the Trainer and the run folders those of `recipes/training.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from recipes.voice import voice

    voice.begin("zero_shot: importing torch and transformers.")

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, TrainerCallback

import qsam
from qsam.generators import TextGenerator
from qsam.zero_shot import Divergence, Game, GameOver, Limits, SamSga, detached
from recipes import training
from recipes.bert_glue import DEMO as GLUE_DEMO
from recipes.bert_glue import EMBEDDED_MODEL, BertOnGlue, GlueOptions, check_task
from recipes.methods import parse_method
from recipes.training import Json, option

GAME = "game.pt"
DEMO: Json = {**GLUE_DEMO, "method": ["fp32", "rtn", "lsq@random", "lsq", "saq@frozen", "saq", "lsq@real"],
              "fit_minutes": 6.0, "output_dir": Path("runs/zero-shot-demo")}  # fmt: skip
"""Settings of `--demo`; rate and rho are those of the GLUE demonstration, chosen there on held-out training rows."""


@dataclass
class ZeroShotOptions(GlueOptions):
    """The options of the GLUE recipe, and the generator's."""

    sources: ClassVar[tuple[str, ...]] = ("generator", "frozen", "random", "real")
    method: list[str] = option(["rtn", "rtn:activations=per_token", "lsq@random", "lsq", "saq@frozen", "saq",
                                "lsq@real"], "as in the other recipes, with @random, @frozen, @generator (the default) "
                               "or @real for the source of the inputs")  # fmt: skip
    generator: str = option(EMBEDDED_MODEL, "folder or hub name of the language model in the generator")
    generator_lr: float = option(1e-5, "learning rate of the generator's Adam")
    generator_steps: int = option(1, "steps of the generator per step of the student")
    generator_sees: Literal["theta", "theta+e"] = option("theta", "the student at which the generator's gradient is")
    tokens: Literal["continuous", "soft", "hard"] = option("continuous", "how the generator's tokens enter the model")
    trained: Literal["all", "adapter", "language_model"] = option("all", "the part of the generator that is trained")
    hidden: float = option(0.0, "weight of the hidden states in D")
    length: int = option(16, "generated tokens per text")
    output_dir: Path = option(Path("runs/zero-shot"), "folder of the runs")


class RandomTokens(nn.Module):
    """The inputs without a generator: random tokens between those of the template."""

    def __init__(self, template: Tensor, inputs: dict[str, Tensor]) -> None:
        super().__init__()
        self.register_buffer("template", template)
        self.names = list(inputs)
        for name, value in inputs.items():
            self.register_buffer(name, value)

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """Return the model's inputs."""
        fixed: Any = self.template
        ids = torch.where(fixed >= 0, fixed, z)
        more = {name: getattr(self, name).expand_as(z) for name in self.names}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


class ZeroShot(BertOnGlue):
    """A BERT that learns from its teacher. Whether a batch is made of draws or of rows decides what the loss is."""

    def __init__(self, options: ZeroShotOptions) -> None:
        if training.processes() > 1:
            raise ValueError("zero-shot training runs in one process: start it without torchrun.")
        super().__init__(options)
        self.options, self.rows, self.row_lengths, self.pad = options, self.train, self.lengths, self.collate
        self.collate = self.batch
        names = "generator generator_lr generator_steps generator_sees tokens trained hidden length".split()
        self.facts |= {"recipe": "zero_shot", **{name: getattr(options, name) for name in names}}
        self._pretrained(AutoConfig, options.generator)  # a name that is none is told before anything is trained
        word = [" ".join(["the"] * options.length)] * (1 if self.task.texts[1:] == () else 2)
        encoded = self.tokenizer(*word, return_special_tokens_mask=True)
        special = torch.tensor(encoded.pop("special_tokens_mask"), dtype=torch.bool)
        self.template = torch.tensor(encoded.pop("input_ids")).masked_fill(~special, -1)
        self.inputs = {name: torch.tensor(v) for name, v in encoded.items() if name != "attention_mask"}
        every, no_words = self.tokenizer.get_vocab(), set(self.tokenizer.all_special_ids)
        self.ids = torch.tensor([i for text, i in sorted(every.items()) if i not in no_words and "[unused" not in text])
        self.game: Game | None = None
        self.sam_sga: SamSga | None = None
        self._z: Tensor | None = None

    def batch(self, rows: list[Any]) -> Json:
        """Return a batch of rows; for numbers the tokens z that follow from them."""
        if not isinstance(rows[0], int):
            return self.pad(rows)
        chance = torch.Generator()
        draws = [torch.randint(len(self.ids), self.template.shape, generator=chance.manual_seed(row)) for row in rows]
        return {"z": self.ids[torch.stack(draws)]}

    def prepare(self, model: nn.Module, config: Json, batches: Iterator[Json]) -> torch.optim.Optimizer:
        """Set the source of inputs up, with the full-precision model as the teacher; quantize the student."""
        method, options = parse_method(config["method"]), self.options
        source = method.source or {"fp32": "real", "rtn": "random"}.get(method.name, "generator")
        self.game = self.sam_sga = self._z = None
        self.train, self.lengths = self.rows, self.row_lengths
        if source == "real":
            return super().prepare(model, config, batches)
        self.train, self.lengths = Numbers(len(self.rows)), None
        teacher: Any = copy.deepcopy(model).eval()
        if source == "random":
            generator: nn.Module = RandomTokens(self.template, self.inputs)
        else:
            torch.manual_seed(config["seed"])
            language_model = self._pretrained(AutoModel, options.generator, dtype=torch.float32)
            generator = TextGenerator(language_model, teacher.get_input_embeddings(), self.template,
                                      tokens=options.tokens, trained=options.trained, inputs=self.inputs,
                                      vocabulary=self.ids)  # fmt: skip
        generator.to(next(model.parameters()).device)
        divergence = Divergence(hidden=options.hidden)
        self.game = Game(teacher, model, generator, divergence, rows=max(2, config["batch_size"]))
        if method.quantizes:
            method.quantize_(model, config, method.rules or qsam.presets.squat_bert)  # qsam
            qsam.calibrate(model, [generator(b["z"]) for b in islice(batches, training.CALIBRATION_BATCHES)])  # qsam
        optimizer = method.optimizer(model, torch.optim.Adam, config, lr=config.get("lr", 0.0), fused=True)  # qsam
        if source == "generator" and method.trains:
            owned = [p for p in generator.parameters() if p.requires_grad]
            adam = torch.optim.Adam(owned, lr=options.generator_lr)
            self.sam_sga = SamSga(optimizer, adam, generator_sees=options.generator_sees, seed=config["seed"])
        return optimizer

    def loss(self, model: nn.Module, batch: Json) -> tuple[Tensor, Any]:
        """Return D for z; for rows the task's loss, and the outputs."""
        if "z" not in batch:
            return super().loss(model, batch)
        assert self.game is not None
        if batch["z"] is not self._z:  # the passes of a step share x
            with torch.no_grad():
                self._z, self._x = batch["z"], detached(self.game.generator(batch["z"]))
        self.game.student = model
        return self.game(self._x), None

    def callbacks(self, trainer: Any) -> list[TrainerCallback]:
        """Return what lets the generator step, if it does."""
        return (
            []
            if self.sam_sga is None or self.game is None
            else [Ascent(trainer, self.sam_sga, self.game, self.options)]
        )

    def figures(self) -> Json:
        """Return what the generator's last step was, for the history of the run."""
        return {} if self.sam_sga is None else {"generator": {"steps": self.sam_sga.generator_steps,
                                                              **self.sam_sga.history[-1]}}  # fmt: skip


class Numbers(torch.utils.data.Dataset):
    """As many numbers as there are training rows: the steps of an epoch, and nothing else of the rows."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> int:
        return number % 2**32


class Ascent(TrainerCallback):
    """Lets the generator step after the student, keeps its state in the checkpoints, and ends a failed game."""

    def __init__(self, trainer: Any, sam_sga: SamSga, game: Game, options: ZeroShotOptions) -> None:
        self.trainer, self.sam_sga, self.game, self.steps, self.limits = (
            trainer,
            sam_sga,
            game,
            options.generator_steps,
            Limits(),
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Go on from the checkpoint that the Trainer goes on from."""
        if state.global_step:
            kept = torch.load(Path(args.output_dir) / f"checkpoint-{state.global_step}" / GAME, weights_only=True)
            self.game.generator.load_state_dict(kept["generator"])
            self.sam_sga.generator_optimizer.load_state_dict(kept["optimizer"])
            self.sam_sga.generator_steps, self.sam_sga.history = kept["steps"], kept["history"]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Let the generator step."""
        is_bf16, before = self.trainer.precision == "bf16", self.sam_sga.generator_passes
        entry: dict[str, float] = {"divergence": self.trainer.course.losses[-1]}
        try:
            for _number in range(self.steps):
                with torch.autocast(args.device.type, torch.bfloat16) if is_bf16 else nullcontext():
                    entry["generator_divergence"] = self.sam_sga.ascend(self.game.sample, self.game)  # qsam
        except GameOver as failure:
            raise ValueError(f"step {state.global_step}: {failure} The last checkpoint is kept.") from failure
        self.trainer.course.passes += self.sam_sga.generator_passes - before
        self.sam_sga.history.append({**entry, **self.game.figures})
        if alarm := self.limits.alarm(self.sam_sga.history):
            raise ValueError(f"step {state.global_step}: {alarm} The last checkpoint is kept.")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the generator into the checkpoint."""
        adam: Any = self.sam_sga.generator_optimizer
        kept = {"generator": self.game.generator.state_dict(), "optimizer": adam.state_dict(),
                "steps": self.sam_sga.generator_steps, "history": self.sam_sga.history}  # fmt: skip
        torch.save(kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / GAME)


# --- the command ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return training.command("zero_shot", partial(read_options, arguments), ZeroShot)


def read_options(arguments: Sequence[str] | None) -> ZeroShotOptions:
    """Read and check the command line."""
    options: ZeroShotOptions = training.parse_options(ZeroShotOptions, DEMO, arguments)
    check_task(options.task)
    return options


if __name__ == "__main__":
    sys.exit(main())
