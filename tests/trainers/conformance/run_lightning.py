"""Lightning's Trainer, with automatic optimization; one loader, with a length or without."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from parts import (
    Recorder,
    TinyModel,
    build_environment,
    build_sampler,
    leave,
    next_token_loss,
    parser,
    tensorboard_metrics,
    write_result,
)

from dmagent_loader import MixingDataLoader
from dmagent_loader._distributed import all_gather_object, get_rank
from dmagent_loader.integrations.lightning import DataMixingCallback


class Module(LightningModule):
    """Writes down what it trains on."""

    def __init__(self, recorder: Recorder, dropout: float) -> None:
        super().__init__()
        self.network, self.recorder = TinyModel(dropout), recorder

    def forward(self, input_ids, attention_mask=None):
        return self.network(input_ids)

    def training_step(self, batch, batch_idx):
        self.recorder.batch(batch["__index__"].tolist(), batch["key"].tolist())
        return next_token_loss(self(batch["input_ids"]), batch["input_ids"])

    def on_train_start(self):
        self.recorder.step = self.global_step

    def on_train_batch_end(self, outputs, batch, batch_idx):
        """After this hook of all callbacks, ModelCheckpoint among them."""
        if self.global_step != self.recorder.step:
            self.recorder.step_done(self.global_step)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class RandomState(Callback):
    """Lightning does not save the random state; dropout asks for it, of each rank."""

    def state_dict(self):
        return {"states": all_gather_object(torch.get_rng_state(), "saving the random states")}

    def load_state_dict(self, state_dict):
        self.restored = state_dict["states"]

    def on_train_start(self, trainer, pl_module):
        if getattr(self, "restored", None):
            torch.set_rng_state(self.restored[trainer.global_rank])


class WithoutLength(MixingDataLoader):
    """As a loader of a stream without an end."""

    def __len__(self):
        raise TypeError("no length")


def main() -> None:
    options = parser()
    options.add_argument("--no-length", action="store_true")
    options = options.parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    sampler = build_sampler(options)
    torch.manual_seed(0)
    module = Module(Recorder(options, rank), options.dropout)
    torch.manual_seed(rank)
    checkpoints = ModelCheckpoint(
        dirpath=options.out / "checkpoints", every_n_train_steps=options.save_every, save_top_k=-1
    )
    callback = DataMixingCallback(sampler, build_environment())
    trainer = Trainer(
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        max_steps=options.steps,
        accumulate_grad_batches=options.accumulation,
        # Checkpoints first in the list: Lightning moves them behind all other callbacks.
        callbacks=[*([checkpoints] if options.save_every else []), callback, RandomState()],
        enable_checkpointing=bool(options.save_every),
        logger=TensorBoardLogger(str(options.out), name="logs"),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    loader = (WithoutLength if options.no_length else MixingDataLoader)(
        sampler,
        batch_size=options.batch_size,
        num_workers=options.workers,
        generator=torch.Generator().manual_seed(0),
    )
    resume = options.resume and max(Path(options.resume).glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    trainer.fit(module, loader, ckpt_path=resume)
    for logger in trainer.loggers:
        logger.finalize("success")
    write_result(
        options,
        get_rank(),
        sampler,
        consumed=callback.consumed,
        global_step=trainer.global_step,
        model=module,
        metrics=tensorboard_metrics(Path(options.out)) if rank == 0 else None,
    )
    leave()


if __name__ == "__main__":
    main()
