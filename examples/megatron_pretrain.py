"""Continual pre-training in a Megatron-core loop while a policy changes the mix of domains: a complete script.

    torchrun --nproc-per-node 8 examples/megatron_pretrain.py --shards SHARDS --tokenizer tokenizer.json \
        --environment general=mmlu.jsonl math=math.jsonl --tensor-parallel 2 --pipeline-parallel 2 --output runs/first

After a crash the same command resumes from the newest whole checkpoint, with the same samples, decisions and dropout.
With other numbers of processes it resumes with the same samples, but with other random states for dropout.

SHARDS is the folder that `dmagent shard --tokenizer ... --sequence-length N` wrote, with `source/...` domains to keep
and `target/...` domains to learn, and N one more than --sequence-length. The model is small and starts from random
weights; put yours in `build_model`.

Without a GPU: torchrun --nproc-per-node 2 -m dmagent_loader.testing.on_cpu examples/megatron_pretrain.py ...
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from tokenizers import Tokenizer
from torch.utils.tensorboard import SummaryWriter

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks
from dmagent_loader.transforms import ShiftedTokens


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--shards", required=True, help="manifest.json of packed shards, or its folder")
    data.add_argument(
        "--environment", nargs="+", required=True, metavar="FIELD=FILE", help="question sets, the field to keep first"
    )
    data.add_argument("--tokenizer", required=True, help="tokenizer.json that the shards were packed with")
    data.add_argument("--sequence-length", type=int, default=1024, help="tokens that the model reads")
    mixing = parser.add_argument_group("mixing")
    mixing.add_argument(
        "--policy", default="question-topics", help="name of a policy that needs no gradients (default: %(default)s)"
    )
    mixing.add_argument("--agent", help="an agent instead, such as dmagent-rl: name, path or Hub id")
    mixing.add_argument("--decisions", type=int, help="number of decisions (default: 80)")
    mixing.add_argument("--samples-per-reweight", type=int, help="instead: samples between decisions")
    training = parser.add_argument_group("training")
    training.add_argument("--output", required=True, type=Path)
    training.add_argument(
        "--steps", type=int, default=1000, help="limit on the steps; the run also ends with the target data"
    )
    training.add_argument("--micro-batch-size", type=int, default=8)
    training.add_argument(
        "--micro-batches", type=int, default=1, help="micro-batches per step on each data-parallel rank"
    )
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument("--save-every", type=int, default=500, help="steps")
    training.add_argument("--tensor-parallel", type=int, default=1)
    training.add_argument("--pipeline-parallel", type=int, default=1)
    training.add_argument("--hidden-size", type=int, default=128)
    training.add_argument("--layers", type=int, default=2)
    training.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build_model(args: argparse.Namespace, vocabulary: int) -> tuple[GPTModel, TransformerConfig]:
    """This process's part of the model."""
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden_size,
        num_attention_heads=4,
        tensor_model_parallel_size=args.tensor_parallel,
        pipeline_model_parallel_size=args.pipeline_parallel,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        # Fused kernels need Transformer Engine or Apex; switch them on where these are installed.
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=-(-vocabulary // args.tensor_parallel) * args.tensor_parallel,
        max_sequence_length=args.sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    return model, config


def forward_step(data_iterator: MegatronMixing, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    """One micro-batch, read by the first and the last stage of a pipeline; the stages between read nothing."""
    batch = {}
    if parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage():
        read = next(data_iterator)
        batch = {name: read[name].cuda() for name in ("tokens", "labels", "loss_mask", "position_ids")}
    losses = model(batch.get("tokens"), batch.get("position_ids"), None, labels=batch.get("labels"))

    def loss(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mean = (losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()
        return mean, {"loss": mean.detach()}

    return losses, loss


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    parallel_state.initialize_model_parallel(args.tensor_parallel, args.pipeline_parallel)
    tensor_parallel.model_parallel_cuda_manual_seed(args.seed)
    rank, data_ranks = torch.distributed.get_rank(), parallel_state.get_data_parallel_world_size()
    global_batch_size = args.micro_batch_size * args.micro_batches * data_ranks
    init_num_microbatches_calculator(rank, None, global_batch_size, args.micro_batch_size, data_ranks)

    tokenizer = Tokenizer.from_file(args.tokenizer)
    torch.manual_seed(args.seed)
    model, config = build_model(args, tokenizer.get_vocab_size())
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model.cuda())
    # clip_grad needs Apex or Transformer Engine.
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=args.learning_rate, clip_grad=0.0), [wrapped]
    )

    sampler = AgentWeightedSampler(
        args.shards,
        policy=args.policy if args.agent is None else None,
        agent=args.agent,
        decisions=args.decisions,
        samples_per_reweight=args.samples_per_reweight,
        transform=ShiftedTokens(length=args.sequence_length),
        seed=args.seed,
        **data_parallel_ranks(),
    )
    environment = Environment.from_files(dict(item.split("=", 1) for item in args.environment), tokenizer)
    mixing = MegatronMixing(
        sampler,
        environment,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=global_batch_size,
        max_length=args.sequence_length,
        train_iters=args.steps,
        writer=SummaryWriter(str(args.output / "logs")) if rank == 0 else None,
    )

    def sharded(*, loading: bool = False) -> dict[str, Any]:
        weights = {"model": model.sharded_state_dict()}
        return {**weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading=loading)}

    layout = [args.tensor_parallel, args.pipeline_parallel, torch.distributed.get_world_size()]
    step, newest = 0, args.output / "newest.txt"
    if newest.exists():
        checkpoint = str(args.output / newest.read_text())
        same_layout = dist_checkpointing.load_common_state_dict(checkpoint)["layout"] == layout
        # Other processes than those that saved have no random states of their own: dropout then differs.
        wanted = {**sharded(loading=True), **(random_states() if same_layout else {})}
        saved = dist_checkpointing.load(wanted, checkpoint)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mixing.load_state_dict(saved["mixing"])
        if same_layout:
            restore_random_states(saved["random"])
        step = saved["step"]

    forward_backward = get_forward_backward_func()
    mixing.begin(wrapped, iteration=step)
    while step < args.steps and not mixing.finished:
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = forward_backward(
            forward_step_func=forward_step,
            data_iterator=mixing.data_iterator,
            model=[wrapped],
            num_microbatches=args.micro_batches,
            seq_length=args.sequence_length,
            micro_batch_size=args.micro_batch_size,
            decoder_seq_length=args.sequence_length,
            forward_only=False,
        )
        optimizer.step()
        step += 1
        report = mixing.step_end(wrapped, iteration=step)
        if losses and rank == torch.distributed.get_world_size() - 1 and (report or step == args.steps):
            print(f"step {step}: loss {sum(float(entry['loss']) for entry in losses) / len(losses):.3f}", flush=True)
        if step % args.save_every == 0 or step == args.steps or mixing.finished:
            state = {"mixing": mixing.state_dict(), "step": step, "layout": layout}
            save({**sharded(), **random_states(), **state}, args.output, step)
    finish()


def random_states() -> dict[str, ShardedObject]:
    """The random states of this process: the CPU's, the GPU's, and those that Megatron keeps for dropout."""
    states = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    ranks = (torch.distributed.get_world_size(),), (torch.distributed.get_rank(),)
    return {"random": ShardedObject("random", states, *ranks)}


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["cpu"])
    torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def save(state: dict[str, Any], output: Path, step: int) -> None:
    """A folder for each checkpoint, and a file that names the newest whole one."""
    folder = output / f"iter_{step:07d}"
    folder.mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    dist_checkpointing.save(state, str(folder))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        part = output / "newest.part"
        part.write_text(folder.name)
        part.replace(output / "newest.txt")
    torch.distributed.barrier()


def finish() -> None:
    for helper in multiprocessing.active_children():  # of dist_checkpointing
        helper.terminate()
        helper.join(5)
    torch.distributed.barrier()
    sys.stdout.flush()
    if not torch.cuda.is_available():  # leaving a gloo process in the normal way aborts now and then
        os._exit(0)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
