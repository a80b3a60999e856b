"""Continual pre-training in a plain PyTorch loop while a policy changes the mix of domains: a complete script.

One process:

    python examples/plain_loop.py --shards SHARDS --environment general=mmlu.jsonl math=math.jsonl \
        --tokenizer tokenizer.json --output runs/first

Several processes; after a crash the same command resumes from the last checkpoint:

    torchrun --nproc-per-node 2 examples/plain_loop.py ... --resume

SHARDS is the folder that `dmagent shard --tokenizer ... --sequence-length N` wrote, with `source/...` domains to keep
and `target/...` domains to learn. Without --model, a small LLaMA-style model is trained from scratch.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dmagent_loader import AgentWeightedSampler, Environment, Mixing, MixingDataLoader
from dmagent_loader.transforms import packed_tokens


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
    training.add_argument("--max-steps", type=int, help="default: until the target data are used up")
    training.add_argument("--batch-size", type=int, default=8, help="batch size per process")
    training.add_argument("--accumulation", type=int, default=1)
    training.add_argument("--workers", type=int, default=0, help="torch data workers per process")
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument("--save-steps", type=int, default=500)
    training.add_argument("--resume", action="store_true", help="resume from the last checkpoint, if any")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if world > 1:
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")

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
    mixing = Mixing(sampler, environment)
    torch.manual_seed(args.seed)
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model)
    else:
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=args.hidden_size,
                intermediate_size=4 * args.hidden_size,
                num_hidden_layers=args.layers,
                num_attention_heads=4,
                max_position_embeddings=1024,
            )
        )
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    wrapped = DistributedDataParallel(model) if world > 1 else model

    checkpoint, step = args.output / "checkpoint.pt", 0
    if args.resume and checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mixing.load_state_dict(saved["mixing"])
        step = saved["step"]

    def save() -> None:
        """Writes the checkpoint on rank 0, whole or not at all."""
        state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({**state, "mixing": mixing.state_dict()}, checkpoint.with_suffix(".tmp"))
        checkpoint.with_suffix(".tmp").replace(checkpoint)

    def write(values: dict[str, Any]) -> None:
        with (args.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def decide() -> None:
        """Evaluates and decides if it is time; all ranks call it together."""
        if mixing.due():
            report = mixing.reweight(
                lambda environment: environment.evaluate(model),
                measure=lambda environment, rows, settings: environment.influence(
                    model, rows, optimizer=optimizer, **settings
                ),
            )
            if rank == 0:
                write(dict(report.full))

    args.output.mkdir(parents=True, exist_ok=True)
    loader = MixingDataLoader(sampler, batch_size=args.batch_size, num_workers=args.workers)
    samples_per_step = args.batch_size * args.accumulation * world
    mixing.begin(samples=None if args.max_steps is None else args.max_steps * samples_per_step)
    decide()  # on the base model, before data workers start reading
    batches = iter(loader)
    while step != args.max_steps and not mixing.finished():
        group = list(islice(batches, args.accumulation))
        for number, batch in enumerate(group, start=1):
            tokens = batch["input_ids"].to(device)
            with nullcontext() if number == len(group) or world == 1 else wrapped.no_sync():
                loss = wrapped(input_ids=tokens, labels=tokens).loss / len(group)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mixing.consumed += sum(len(batch["input_ids"]) for batch in group) * world
        decide()
        if rank == 0 and step % args.save_steps == 0:
            save()

    mixing.end()
    if rank == 0:
        save()
        model.save_pretrained(args.output / "model")
    if world > 1:
        torch.distributed.barrier()
        if not on_gpu:  # leaving a gloo process the normal way aborts now and then
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
