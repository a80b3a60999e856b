"""A Megatron-core loop: GPTModel, Megatron's DistributedDataParallel, optimizer, schedules and distributed checkpoints.

With several processes the model can lie on two of them: ``--tensor 2`` or ``--pipeline 2``; then only the first of the
tensor-parallel peers reads data and sends it to the others, as Megatron-LM does.
"""

from __future__ import annotations

import multiprocessing
import os
import zlib
from pathlib import Path

import torch
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
from torch.utils.tensorboard import SummaryWriter

from dmagent_loader.testing.on_cpu import cuda_on_cpu
from dmagent_loader.transforms import ShiftedTokens

shifted = ShiftedTokens(length=ROW_TOKENS)


def row(sample):
    return {**shifted(sample), "key": zlib.crc32(sample["__key__"].encode())}


def main() -> None:
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.transformer import TransformerConfig

    from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks

    options = parser()
    options.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes")
    options.add_argument("--pipeline", type=int, default=1, help="pipeline-parallel processes")
    options.add_argument("--no-random", action="store_true", help="at resume, leave the random states as they are")
    options = options.parse_args()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(options.tensor, options.pipeline)
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    peer = parallel_state.get_tensor_model_parallel_rank()
    rank, data_ranks = torch.distributed.get_rank(), parallel_state.get_data_parallel_world_size()
    global_batch_size = options.batch_size * options.accumulation * data_ranks
    init_num_microbatches_calculator(rank, None, global_batch_size, options.batch_size, data_ranks)

    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        tensor_model_parallel_size=options.tensor,
        pipeline_model_parallel_size=options.pipeline,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        hidden_dropout=options.dropout,
        attention_dropout=0.0,
    )
    torch.manual_seed(0)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=64,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
    )
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), gpt)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-2, clip_grad=0.0), [model])

    sampler = build_sampler(options, transform=row, **data_parallel_ranks())
    writer = SummaryWriter(str(options.out / "logs")) if rank == 0 else None
    mixing = MegatronMixing(
        sampler,
        build_environment(),
        micro_batch_size=options.batch_size,
        global_batch_size=global_batch_size,
        max_length=64,
        num_workers=options.workers,
        writer=writer,
    )
    recorder = Recorder(options, parallel_state.get_data_parallel_rank() if first and peer == 0 else None)

    def state(*, loading: bool = False) -> dict:
        weights = {"model": gpt.sharded_state_dict()}
        random = {
            "cpu": torch.get_rng_state(),
            "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
        everything = {**weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading)}
        if not (loading and options.no_random):
            world = torch.distributed.get_world_size()
            everything["random"] = dist_checkpointing.mapping.ShardedObject("random", random, (world,), (rank,))
        return everything if loading else {**everything, "step": step, "mixing": mixing.state_dict()}

    step = 0
    if options.resume:
        newest = Path(options.resume, Path(options.resume, "newest.txt").read_text())
        loaded = dist_checkpointing.load(state(loading=True), str(newest))
        gpt.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        mixing.load_state_dict(loaded["mixing"])
        step = recorder.step = loaded["step"]
        if not options.no_random:
            torch.set_rng_state(loaded["random"]["cpu"])
            tensor_parallel.get_cuda_rng_tracker().set_states(loaded["random"]["tracker"])

    def forward_step(data_iterator, model):
        batch = {}
        if first or last:
            if peer == 0:
                batch = next(data_iterator)
                recorder.batch(batch.pop("__index__"), batch.pop("key"))
                batch.pop("__domain__"), batch.pop("__key__")
            batch = share(batch, options)
        output = model(batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels"))

        def loss(losses):
            mean = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
            return mean, {"loss": mean.detach()}

        return output, loss

    def share(batch: dict, options) -> dict:
        if options.tensor == 1:
            return batch
        source = parallel_state.get_tensor_model_parallel_src_rank()
        names = {"tokens": torch.int64, "labels": torch.int64, "position_ids": torch.int64, "loss_mask": torch.float32}
        for name, dtype in names.items():
            if peer != 0:
                batch[name] = torch.empty(options.batch_size, ROW_TOKENS, dtype=dtype)
            batch[name] = batch[name].contiguous()
            torch.distributed.broadcast(batch[name], source, group=parallel_state.get_tensor_model_parallel_group())
        return batch

    forward_backward = get_forward_backward_func()
    mixing.begin(model, iteration=step)
    while step < options.steps and not mixing.finished:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        forward_backward(
            forward_step_func=forward_step,
            data_iterator=mixing.data_iterator,
            model=[model],
            num_microbatches=options.accumulation,
            seq_length=ROW_TOKENS,
            micro_batch_size=options.batch_size,
            decoder_seq_length=ROW_TOKENS,
            forward_only=False,
        )
        optimizer.step()
        step += 1
        mixing.step_end(model, iteration=step)
        if options.save_every and step % options.save_every == 0:
            save(state(), options.out / "checkpoints", step)
        recorder.step_done(step)

    if writer:
        writer.close()
    write_result(
        options,
        rank,
        sampler,
        consumed=mixing.consumed,
        global_step=step,
        model=model,
        metrics=tensorboard_metrics(options.out / "logs") if rank == 0 else None,
    )
    for helper in multiprocessing.active_children():  # of dist_checkpointing
        helper.terminate()
        helper.join(5)
    leave()


def save(state: dict, checkpoints: Path, step: int) -> None:
    """As Megatron-LM does: a folder for each checkpoint, and a file that names the newest whole one."""
    from megatron.core import dist_checkpointing

    folder = checkpoints / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        (checkpoints / "newest.tmp").write_text(folder.name)
        (checkpoints / "newest.tmp").replace(checkpoints / "newest.txt")


if __name__ == "__main__":
    with cuda_on_cpu():
        main()
