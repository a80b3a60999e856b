"""Continual pre-training with Lightning while a policy changes the mix of domains: a complete script.

One process:

    python examples/lightning_trainer.py --shards SHARDS --environment general=mmlu.jsonl math=math.jsonl \
        --tokenizer tokenizer.json --output runs/first

Several processes, started by Lightning itself; after a crash the same command resumes from the last checkpoint:

    python examples/lightning_trainer.py ... --devices 2 --resume

SHARDS is the folder that `dmagent shard --tokenizer ... --sequence-length N` wrote, with `source/...` domains to keep
and `target/...` domains to learn. Without --model, a small LLaMA-style model is trained from scratch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmagent_loader import AgentWeightedSampler, Environment, MixingDataLoader
from dmagent_loader.integrations.lightning import DataMixingCallback
from dmagent_loader.transforms import packed_tokens


class LanguageModel(LightningModule):
    """Any causal model of transformers."""

    def __init__(self, network: torch.nn.Module, learning_rate: float) -> None:
        super().__init__()
        self.network, self.learning_rate = network, learning_rate

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        loss = self.network(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        self.log("loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


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
    data.add_argument("--tokenizer", required=True, help="tokenizer that the shards were packed with")
    data.add_argument("--max-questions", type=int, help="limit on the questions of each field")
    mixing = parser.add_argument_group("mixing")
    mixing.add_argument(
        "--policy", choices=["influence", "question-topics"], default="influence", help="default: %(default)s"
    )
    mixing.add_argument("--agent", help="an agent instead, such as dmagent-plus: name, path or Hub id")
    mixing.add_argument("--decisions", type=int, help="number of decisions (default: 80)")
    mixing.add_argument("--samples-per-reweight", type=int, help="instead: samples between decisions")
    mixing.add_argument("--exhausted", choices=["repeat", "stop", "redistribute", "error"])
    training = parser.add_argument_group("training")
    training.add_argument("--model", help="model to continue from: folder or Hub id (default: from scratch)")
    training.add_argument("--hidden-size", type=int, default=128, help="width of the model from scratch")
    training.add_argument("--layers", type=int, default=2, help="layers of the model from scratch")
    training.add_argument("--output", required=True, type=Path)
    training.add_argument("--max-steps", type=int, default=-1, help="default: until the target data are used up")
    training.add_argument("--batch-size", type=int, default=8, help="batch size per process")
    training.add_argument("--accumulation", type=int, default=1)
    training.add_argument("--workers", type=int, default=0, help="torch data workers per process")
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument(
        "--precision", default="32-true", help="Lightning's name of the precision (default: %(default)s)"
    )
    training.add_argument("--devices", type=int, default=1, help="processes on this machine")
    training.add_argument("--save-steps", type=int, default=500)
    training.add_argument("--resume", action="store_true", help="resume from the last checkpoint, if any")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.tokenizer.endswith(".json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=args.tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    files = dict(item.split("=", 1) for item in args.environment)
    environment = Environment.from_files(files, tokenizer, max_questions=args.max_questions)
    sampler = AgentWeightedSampler(
        args.shards,
        policy=args.policy if args.agent is None else None,
        agent=args.agent,
        decisions=args.decisions,
        samples_per_reweight=args.samples_per_reweight,
        exhausted=args.exhausted,
        transform=packed_tokens,
        seed=args.seed,
    )
    torch.manual_seed(args.seed)
    if args.model:
        network = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        network = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=args.hidden_size,
                intermediate_size=4 * args.hidden_size,
                num_hidden_layers=args.layers,
                num_attention_heads=4,
                max_position_embeddings=1024,
            )
        )
    module = LanguageModel(network, args.learning_rate)

    mixing = DataMixingCallback(sampler, environment, model=lambda module: module.network)
    checkpoints = ModelCheckpoint(
        dirpath=args.output / "checkpoints",
        every_n_train_steps=args.save_steps,
        save_on_train_epoch_end=True,
        save_top_k=0,
        save_last=True,
    )
    trainer = Trainer(
        accelerator="cpu" if args.cpu else "auto",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        precision=args.precision,
        max_steps=args.max_steps,
        max_epochs=-1,  # the callback stops training when the target data are used up
        accumulate_grad_batches=args.accumulation,
        logger=CSVLogger(args.output, name="logs"),
        callbacks=[mixing, checkpoints],
    )
    loader = MixingDataLoader(sampler, batch_size=args.batch_size, num_workers=args.workers)
    trainer.fit(module, loader, ckpt_path="last" if args.resume else None)
    if trainer.is_global_zero:
        network.save_pretrained(args.output / "model")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if args.cpu:  # leaving a gloo process the normal way aborts now and then
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
