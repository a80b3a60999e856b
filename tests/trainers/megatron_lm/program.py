"""Megatron-LM's own pretrain() on its own GPT model, with our data and our evaluation; started by the test."""

from __future__ import annotations

import inspect
import json
import os
import sys
from functools import partial
from itertools import repeat
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from parts import ROW_TOKENS, Recorder, build_environment, build_sampler, leave, parser
from run_megatron import row

from dmagent_loader.testing.on_cpu import cuda_on_cpu

MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--position-embedding-type", "rope"),
    *("--seq-length", str(ROW_TOKENS), "--max-position-embeddings", "64", "--use-cpu-initialization"),
    *("--transformer-impl", "local", "--attention-backend", "unfused", "--no-persist-layer-norm"),
    *("--no-gradient-accumulation-fusion", "--no-bias-gelu-fusion", "--no-bias-dropout-fusion"),
    *("--no-masked-softmax-fusion", "--no-rope-fusion", "--tokenizer-type", "NullTokenizer", "--vocab-size", "63"),
    *("--distributed-backend", "gloo", "--lr", "1e-2", "--clip-grad", "0", "--eval-iters", "1", "--log-interval", "1"),
    *("--dataloader-type", "external", "--attention-dropout", "0"),
    *("--ckpt-format", "torch", "--no-create-attention-mask-in-dataloader"),
]


def main() -> None:
    options = parser()
    options.add_argument("--base", required=True)
    options.add_argument("--skip-train", action="store_true")
    options = options.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        os.environ.setdefault(name, value)
    world = int(os.environ["WORLD_SIZE"])
    checkpoints = options.out / "checkpoints"
    global_batch = options.batch_size * options.accumulation * world
    sys.argv = ["program", *MODEL, "--micro-batch-size", str(options.batch_size), "--train-iters", str(options.steps)]
    sys.argv += ["--global-batch-size", str(global_batch), "--dataloader-save", str(checkpoints)]
    sys.argv += ["--eval-interval", str(options.samples_per_reweight // global_batch)]
    sys.argv += ["--tensorboard-dir", str(options.out / "logs")]
    sys.argv += ["--hidden-dropout", str(options.dropout)]
    if options.save_every:
        sys.argv += ["--save", str(checkpoints), "--save-interval", str(options.save_every)]
    if options.resume:
        sys.argv += ["--load", options.resume, "--dataloader-save", options.resume]
    if options.skip_train:
        sys.argv.append("--skip-train")

    from megatron.core.datasets import utils as builtin_datasets
    from megatron.core.parallel_state import get_data_parallel_rank
    from megatron.training import get_args

    from dmagent_loader.integrations.megatron import MegatronMixing, data_parallel_ranks
    from dmagent_loader.integrations.megatron_lm import PretrainHooks

    builtin_datasets.compile_helpers = lambda: None  # of no use here, and the wheel lacks the Makefile for it
    recorders: list[Recorder] = []

    def build() -> MegatronMixing:
        recorders.append(Recorder(options, get_data_parallel_rank()))
        recorders[0].step = get_args().iteration
        return MegatronMixing(
            build_sampler(options, transform=row, **data_parallel_ranks()),
            build_environment(),
            micro_batch_size=options.batch_size,
            global_batch_size=global_batch,
            max_length=64,
        )

    ones = {name: torch.ones(options.batch_size, ROW_TOKENS, dtype=torch.int64) for name in ("tokens", "labels")}
    ones["position_ids"] = torch.arange(ROW_TOKENS).expand(options.batch_size, -1)
    ones["loss_mask"] = torch.ones(options.batch_size, ROW_TOKENS)
    hooks = PretrainHooks(build, base_feedback=options.base, validation=repeat(ones))

    def forward_step(data_iterator, model):
        batch = next(data_iterator)
        if "__index__" in batch and model.training:
            step = get_args().curr_iteration
            if options.kill_at is not None and step >= options.kill_at:
                recorders[0].step_done(step)
            recorders[0].step = step
            recorders[0].batch(batch["__index__"], batch["key"])
        losses = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(mask, losses):
            mean = (losses * mask).sum() / mask.sum()
            return mean, {"lm loss": mean.detach()}

        return losses, partial(loss, batch["loss_mask"])

    start(hooks, forward_step)
    rank = torch.distributed.get_rank()
    result = {
        "consumed": hooks.mixing.consumed,
        "end": hooks.mixing.sampler.end,
        "ledger": hooks.mixing.sampler.ledger.to_json(),
        "metrics": {},
    }
    (options.out / f"result-{rank}.json").write_text(json.dumps(result))
    leave()


def start(hooks, forward_step) -> None:
    """Calls `pretrain` as this version of Megatron-LM wants it."""
    from megatron.core.enums import ModelType
    from megatron.training import pretrain

    from dmagent_loader.integrations.megatron_lm import add_arguments

    if "extra_args_provider" in inspect.signature(pretrain).parameters:  # up to 0.17
        import megatron.legacy.fused_kernels
        from gpt_builders import gpt_builder
        from model_provider import model_provider

        megatron.legacy.fused_kernels.load = lambda args: None  # compiles for the GPU
        pretrain(
            hooks.datasets_provider,
            partial(model_provider, gpt_builder),
            ModelType.encoder_or_decoder,
            forward_step,
            extra_args_provider=add_arguments,
            non_loss_data_func=hooks.non_loss_data_func,
        )
        return
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=add_arguments)
    pretrain(
        pretrain_cfg_container_from_args(args, gpt_config_from_args(args)),
        hooks.datasets_provider,
        ModelType.encoder_or_decoder,
        forward_step,
        non_loss_data_func=hooks.non_loss_data_func,
    )


if __name__ == "__main__":
    with cuda_on_cpu(available=True):
        main()
