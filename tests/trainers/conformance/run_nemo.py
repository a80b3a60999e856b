"""A NeMo 2 LLM recipe: `llm.train` with GPTModel, MegatronStrategy, NeMoLogger, its ModelCheckpoint and AutoResume.

``--dropout`` is left out: NeMo's checkpoints hold no random state, so that no NeMo run with dropout goes on exactly.
"""

from __future__ import annotations

import os
import zlib


def main() -> None:
    # Not above: distributed checkpointing starts a helper process, which imports this file.
    import lightning.pytorch as pl
    import nemo.lightning as nl
    import torch
    from lightning.pytorch.loggers import TensorBoardLogger
    from megatron.core import parallel_state
    from megatron.core.optimizer import OptimizerConfig
    from nemo.collections import llm
    from nemo.collections.llm.gpt.model.base import GPTConfig, GPTModel, gpt_data_step, local_layer_spec
    from parts import (
        ROW_TOKENS,
        VOCABULARY,
        Recorder,
        build_environment,
        build_sampler,
        leave,
        parser,
        tensorboard_metrics,
        write_result,
    )

    from dmagent_loader.integrations.nemo import AgentWeightedDataModule, DataMixingCallback
    from dmagent_loader.transforms import ShiftedTokens

    shifted = ShiftedTokens(length=ROW_TOKENS)

    def row(sample):
        return {**shifted(sample), "key": zlib.crc32(sample["__key__"].encode())}

    options = parser()
    options.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes")
    options.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel processes")
    options = options.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    data_ranks = processes // (options.tensor * options.pipeline)
    sampler = build_sampler(options, transform=row)

    class Recording(pl.Callback):
        """Steps, and the tags of each micro-batch as NeMo's data step gets it."""

        recorder = None

        def on_train_start(self, trainer, pl_module):
            reads = parallel_state.is_pipeline_first_stage() and parallel_state.get_tensor_model_parallel_rank() == 0
            self.recorder = Recorder(options, parallel_state.get_data_parallel_rank() if reads else None)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.recorder.step_done(trainer.global_step)  # of the last step, whose checkpoint was written after it

        def data_step(self, batches):
            batch, *rest = next(batches)
            if options.tensor > 1:  # each of the peers reads
                peers = [None] * options.tensor
                group = parallel_state.get_tensor_model_parallel_group()
                torch.distributed.all_gather_object(peers, batch["__index__"].tolist(), group=group)
                assert peers == peers[:1] * options.tensor
            self.recorder.batch(batch["__index__"], batch["key"])
            return gpt_data_step(iter([(batch, *rest)]))

    recording = Recording()
    torch.manual_seed(0)
    model = GPTModel(
        GPTConfig(
            num_layers=2,
            hidden_size=32,
            num_attention_heads=2,
            ffn_hidden_size=64,
            seq_length=64,
            vocab_size=VOCABULARY,
            position_embedding_type="rope",
            hidden_dropout=0.0,
            attention_dropout=0.0,
            use_cpu_initialization=True,
            transformer_layer_spec=local_layer_spec,
            gradient_accumulation_fusion=False,
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            apply_rope_fusion=False,
            data_step_fn=recording.data_step,
        ),
        optim=nl.MegatronOptimizerModule(
            OptimizerConfig(optimizer="adam", lr=1e-2, use_distributed_optimizer=False, clip_grad=0.0)
        ),
    )
    data = AgentWeightedDataModule(
        sampler,
        seq_length=ROW_TOKENS,
        micro_batch_size=options.batch_size,
        global_batch_size=options.batch_size * options.accumulation * data_ranks,
        num_workers=options.workers,
        pin_memory=False,
    )
    callback = DataMixingCallback(sampler, build_environment())
    trainer = nl.Trainer(
        accelerator="cpu",
        devices=processes,
        max_steps=options.steps,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=options.tensor,
            pipeline_model_parallel_size=options.pipeline,
            pipeline_dtype=torch.float32 if options.pipeline > 1 else None,
            process_group_backend="gloo",
            ckpt_async_save=False,
            replace_progress_bar=False,  # NeMo's printer gathers timers on rank 0 alone: gloo waits for the others
        ),
        callbacks=[callback, recording],
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_checkpointing=bool(options.save_every),
    )
    checkpoints = nl.ModelCheckpoint(
        dirpath=options.out / "checkpoints",
        monitor="reduced_train_loss",
        every_n_train_steps=options.save_every,
        save_last="link",
    )
    llm.train(
        model,
        data,
        trainer,
        log=nl.NeMoLogger(
            log_dir=str(options.out),
            name="run",
            use_datetime_version=False,
            tensorboard=TensorBoardLogger(save_dir="logs"),
            ckpt=checkpoints if options.save_every else None,
        ),
        resume=nl.AutoResume(resume_if_exists=True, resume_from_directory=options.resume) if options.resume else None,
    )
    write_result(
        options,
        rank,
        sampler,
        consumed=callback.consumed,
        global_step=trainer.global_step,
        model=model,
        metrics=tensorboard_metrics(options.out) if rank == 0 else None,
    )
    leave()


if __name__ == "__main__":
    from dmagent_loader.testing.on_cpu import cuda_on_cpu

    with cuda_on_cpu():
        main()
