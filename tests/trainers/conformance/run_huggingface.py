"""The Hugging Face Trainer, stock or with the mixin."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from parts import (
    VOCABULARY,
    Recorder,
    build_environment,
    build_sampler,
    leave,
    parser,
    tensorboard_metrics,
    write_result,
)
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dmagent_loader.integrations.huggingface import DataMixingCallback, DataMixingTrainerMixin, last_whole_checkpoint


class MixingTrainer(DataMixingTrainerMixin, Trainer):
    pass


class Recording(TrainerCallback):
    """Reads the tags of each micro-batch as the model gets it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.recorder.step = state.global_step
        model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        kwargs.pop("attention_mask", None)
        indices, keys = kwargs.pop("__index__", None), kwargs.pop("key", None)
        if indices is not None:
            self.recorder.batch(indices.tolist(), keys.tolist())
        return args, kwargs

    def on_step_end(self, args, state, control, **kwargs):
        self.recorder.step_done(state.global_step)


def main() -> None:
    options = parser()
    options.add_argument("--mode", choices=["default", "nodispatch", "mixin", "split"], default="default")
    options.add_argument("--epochs", type=float)
    options = options.parse_args()
    rank = int(os.environ.get("RANK", 0))
    arguments = TrainingArguments(
        output_dir=str(options.out / "checkpoints"),
        max_steps=-1 if options.epochs else options.steps,
        num_train_epochs=options.epochs or 1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        dataloader_num_workers=options.workers,
        report_to=["tensorboard"],
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 1,
        logging_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        remove_unused_columns=False,
        accelerator_config={"default": {}, "mixin": {}, "nodispatch": {"dispatch_batches": False}}.get(
            options.mode, {"split_batches": True}
        ),
    )
    sampler = build_sampler(options)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=options.dropout,
        )
    )
    callback = DataMixingCallback(sampler, build_environment())
    trainer_class = MixingTrainer if options.mode == "mixin" else Trainer
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=sampler,
        callbacks=[callback, Recording(Recorder(options, rank))],
    )
    checkpoint = options.resume
    if checkpoint and not (Path(checkpoint) / "trainer_state.json").exists():
        checkpoint = last_whole_checkpoint(checkpoint)
    trainer.train(resume_from_checkpoint=checkpoint)
    write_result(
        options,
        rank,
        sampler,
        consumed=callback.consumed,
        global_step=trainer.state.global_step,
        model=model,
        metrics=tensorboard_metrics(Path(options.out)) if rank == 0 else None,
    )
    leave()


if __name__ == "__main__":
    main()
