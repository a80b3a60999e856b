"""Continual pre-training with the Hugging Face Trainer while a policy changes the mix of domains: a complete script.

One process:

    python examples/huggingface_trainer.py --shards SHARDS --environment general=mmlu.jsonl math=math.jsonl \
        --tokenizer tokenizer.json --output runs/first

Several processes; after a crash the same command resumes from the newest whole checkpoint:

    torchrun --nproc-per-node 2 examples/huggingface_trainer.py ... --resume

SHARDS is the folder that `dmagent shard --tokenizer ... --sequence-length N` wrote, with `source/...` domains to keep
and `target/...` domains to learn. Without --model, a small LLaMA-style model is trained from scratch.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from dmagent_loader import AgentWeightedSampler, Environment
from dmagent_loader.integrations.huggingface import (
    DataMixingCallback,
    DataMixingTrainerMixin,
    last_whole_checkpoint,
)
from dmagent_loader.transforms import packed_tokens


class MixingTrainer(DataMixingTrainerMixin, Trainer):
    """A Trainer that fetches nothing ahead: a new mix holds from the next step on (optional)."""


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
    mixing.add_argument(
        "--static-target", type=float, metavar="SHARE", help="instead: fixed share of target data, no decisions"
    )
    mixing.add_argument("--decisions", type=int, help="number of decisions (default: 80)")
    mixing.add_argument("--samples-per-reweight", type=int, help="instead: samples between decisions")
    mixing.add_argument("--exhausted", choices=["repeat", "stop", "redistribute", "error"])
    mixing.add_argument("--zero-look-ahead", action="store_true", help="use the sampler's own loader")
    training = parser.add_argument_group("training")
    training.add_argument("--model", help="model to continue from: folder or Hub id (default: from scratch)")
    training.add_argument("--hidden-size", type=int, default=128, help="width of the model from scratch")
    training.add_argument("--layers", type=int, default=2, help="layers of the model from scratch")
    training.add_argument("--output", required=True)
    training.add_argument("--max-steps", type=int, default=-1, help="default: until the target data are used up")
    training.add_argument("--batch-size", type=int, default=8, help="batch size per process")
    training.add_argument("--accumulation", type=int, default=1)
    training.add_argument("--workers", type=int, default=0, help="torch data workers per process")
    training.add_argument("--learning-rate", type=float, default=1e-3)
    training.add_argument("--save-steps", type=int, default=500)
    training.add_argument("--logging-steps", type=int, default=50)
    training.add_argument("--report-to", nargs="*", default=["tensorboard"])
    training.add_argument("--resume", action="store_true", help="resume from the newest whole checkpoint, if any")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--cpu", action="store_true")
    return parser.parse_args()


def main() -> None:
    args = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.max_steps,
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        dataloader_num_workers=args.workers,
        learning_rate=args.learning_rate,
        save_steps=args.save_steps,
        logging_steps=args.logging_steps,
        report_to=args.report_to,
        seed=args.seed,
        use_cpu=args.cpu,
    )  # also sets up torch.distributed under torchrun

    if args.tokenizer.endswith(".json"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=args.tokenizer)
    else:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    files = dict(item.split("=", 1) for item in args.environment)
    environment = Environment.from_files(files, tokenizer, max_questions=args.max_questions)

    static = args.static_target
    sampler = AgentWeightedSampler(
        args.shards,
        policy=args.policy if static is None and args.agent is None else None,
        agent=args.agent if static is None else None,
        initial_mix={"source": 1 - static, "target": static} if static is not None else None,
        decisions=args.decisions,
        samples_per_reweight=args.samples_per_reweight,
        exhausted=args.exhausted,
        transform=packed_tokens,
        seed=args.seed,
    )
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

    trainer_class = MixingTrainer if args.zero_look_ahead else Trainer
    trainer = trainer_class(
        model=model, args=training, train_dataset=sampler, callbacks=[DataMixingCallback(sampler, environment)]
    )
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(args.output) if args.resume else None)
    trainer.save_model()
    trainer.save_state()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        if args.cpu:  # leaving a gloo process the normal way aborts now and then
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
