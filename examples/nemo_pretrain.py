"""Continual pre-training with a NeMo LLM recipe while a policy changes the mix of domains: a complete script.

NeMo 2.7.3, the newest with `nemo.collections.llm` (pip install 'dmagent-loader[nemo]' in an environment of its own).

    torchrun --nproc-per-node 8 examples/nemo_pretrain.py --shards SHARDS --tokenizer TOKENIZER \
        --environment general=mmlu.jsonl math=math.jsonl --model nemo_checkpoint --output runs/first

After a crash the same command resumes from the newest whole checkpoint.

SHARDS is the folder that `dmagent shard --tokenizer ... --sequence-length N` wrote, with N one more than --seq-length
here, `source/...` domains to keep and `target/...` domains to learn. Without --model, a small Llama is trained from
scratch, to try things out.

Without a GPU: torchrun --nproc-per-node 2 -m dmagent_loader.testing.on_cpu examples/nemo_pretrain.py --cpu ...
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import nemo.lightning as nl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from megatron.core.optimizer import OptimizerConfig
from nemo.collections import llm
from nemo.collections.common.tokenizers import AutoTokenizer
from nemo.collections.llm.gpt.model.base import local_layer_spec

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.nemo import AgentWeightedDataModule, DataMixingCallback


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--shards", required=True, help="manifest.json of packed shards, or its folder")
    data.add_argument(
        "--environment",
        nargs="+",
        required=True,
        metavar="FIELD=FILE",
        help="question sets: first the field to keep, then the one to learn; JSON lines with the columns question "
        "and answer",
    )
    data.add_argument("--tokenizer", required=True, help="tokenizer that the shards were packed with: folder or Hub id")
    data.add_argument("--max-questions", type=int, help="limit on the questions of each field")
    mixing = parser.add_argument_group("mixing")
    mixing.add_argument(
        "--policy", default="question-topics", help="name of a policy that needs no gradients (default: %(default)s)"
    )
    mixing.add_argument("--agent", help="an agent instead, such as dmagent-rl: name, path or Hub id")
    mixing.add_argument(
        "--static-target", type=float, metavar="SHARE", help="instead: fixed share of target data, no decisions"
    )
    mixing.add_argument("--decisions", type=int, help="number of decisions (default: 80)")
    mixing.add_argument("--samples-per-reweight", type=int, help="instead: samples between decisions")
    mixing.add_argument("--exhausted", choices=["repeat", "stop", "redistribute", "error"])
    training = parser.add_argument_group("training")
    training.add_argument("--model", type=Path, help="NeMo checkpoint to continue from: folder (default: from scratch)")
    training.add_argument("--hidden-size", type=int, default=256, help="width of the model from scratch")
    training.add_argument("--layers", type=int, default=4, help="layers of the model from scratch")
    training.add_argument("--seq-length", type=int, default=2048)
    training.add_argument("--output", required=True)
    training.add_argument("--max-steps", type=int, default=-1, help="default: until the target data are used up")
    training.add_argument("--micro-batch-size", type=int, default=1)
    training.add_argument("--global-batch-size", type=int, default=256)
    training.add_argument("--workers", type=int, default=0, help="torch data workers per process")
    training.add_argument("--learning-rate", type=float, default=1e-4)
    training.add_argument("--save-steps", type=int, default=500)
    training.add_argument("--devices", type=int, default=int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    training.add_argument("--nodes", type=int, default=1)
    training.add_argument("--tensor-parallel", type=int, default=1)
    training.add_argument("--pipeline-parallel", type=int, default=1)
    training.add_argument("--seed", type=int, default=0)
    training.add_argument(
        "--cpu", action="store_true", help="settings without a GPU; needs -m dmagent_loader.testing.on_cpu"
    )
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = AutoTokenizer(args.tokenizer)
    files = dict(item.split("=", 1) for item in args.environment)
    environment = Environment.from_files(files, tokenizer.tokenizer, max_questions=args.max_questions)

    static = args.static_target
    sampler = AgentWeightedSampler(
        args.shards,
        policy=args.policy if static is None and args.agent is None else None,
        agent=args.agent if static is None else None,
        initial_mix={"source": 1 - static, "target": static} if static is not None else None,
        decisions=args.decisions,
        samples_per_reweight=args.samples_per_reweight,
        exhausted=args.exhausted,
        seed=args.seed,
    )
    data = AgentWeightedDataModule(
        sampler,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        global_batch_size=args.global_batch_size,
        tokenizer=tokenizer,
        num_workers=args.workers,
        pin_memory=not args.cpu,
    )

    torch.manual_seed(args.seed)
    on_cpu = {
        "use_cpu_initialization": True,
        "transformer_layer_spec": local_layer_spec,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
    }
    if args.model:
        model = nl.io.load_context(args.model / "context", subpath="model")
    else:
        model = llm.LlamaModel(
            llm.LlamaConfig(
                num_layers=args.layers,
                hidden_size=args.hidden_size,
                ffn_hidden_size=4 * args.hidden_size,
                num_attention_heads=4,
                seq_length=args.seq_length,
                **(on_cpu if args.cpu else {}),
            )
        )
    trainer = nl.Trainer(
        accelerator="cpu" if args.cpu else "gpu",
        devices=args.devices,
        num_nodes=args.nodes,
        max_steps=args.max_steps,
        strategy=nl.MegatronStrategy(
            tensor_model_parallel_size=args.tensor_parallel,
            pipeline_model_parallel_size=args.pipeline_parallel,
            pipeline_dtype=torch.bfloat16 if args.pipeline_parallel > 1 else None,
            process_group_backend="gloo" if args.cpu else None,
            ckpt_async_save=not args.cpu,
            replace_progress_bar=not args.cpu,
        ),
        plugins=None if args.cpu else nl.MegatronMixedPrecision(precision="bf16-mixed"),
        callbacks=[DataMixingCallback(sampler, environment)],
        log_every_n_steps=10,
        use_distributed_sampler=False,
    )
    llm.pretrain(
        model,
        data,
        trainer,
        log=nl.NeMoLogger(
            log_dir=args.output,
            name="run",
            tensorboard=TensorBoardLogger(save_dir="logs"),
            ckpt=nl.ModelCheckpoint(
                monitor="reduced_train_loss",
                every_n_train_steps=args.save_steps,
                save_top_k=1,
                save_optim_on_train_end=True,  # or a longer run could not continue from there
            ),
        ),
        resume=nl.AutoResume(
            resume_if_exists=True,
            resume_ignore_no_checkpoint=True,
            restore_config=nl.RestoreConfig(path=str(args.model)) if args.model else None,
        ),
        optim=nl.MegatronOptimizerModule(
            OptimizerConfig(
                optimizer="adam",
                lr=args.learning_rate,
                bf16=not args.cpu,
                use_distributed_optimizer=not args.cpu,
                clip_grad=0.0 if args.cpu else 1.0,
            )
        ),
    )


if __name__ == "__main__":
    main()
