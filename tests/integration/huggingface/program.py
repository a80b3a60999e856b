"""A training run with a stock Trainer that writes down every sample it trains on; started by the tests, also by
torchrun."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import zlib
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from dmagent_loader import AgentWeightedSampler, Environment, MixingAgent
from dmagent_loader.agent import AgentConfig
from dmagent_loader.history import FeedbackStatistics
from dmagent_loader.integrations.huggingface import DataMixingCallback, DataMixingTrainerMixin

VOCABULARY = 64


class MixingTrainer(DataMixingTrainerMixin, Trainer):
    pass


class Recorder(TrainerCallback):
    """Writes the global indices of each micro-batch as the model sees it, and when asked waits or dies at a step."""

    def __init__(self, path: Path, slow_until: int, kill_at: int | None) -> None:
        self.file = path.open("w")
        self.step, self.slow_until, self.kill_at = 0, slow_until, kill_at

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.step = state.global_step
        model.register_forward_pre_hook(self.record, with_kwargs=True)

    def record(self, module, args, kwargs):
        kwargs.pop("attention_mask", None)
        indices, keys = kwargs.pop("__index__", None), kwargs.pop("key", None)
        if indices is not None:
            self.file.write(json.dumps({"step": self.step, "indices": indices.tolist(), "keys": keys.tolist()}) + "\n")
            self.file.flush()
        return args, kwargs

    def on_step_end(self, args, state, control, **kwargs):
        self.step = state.global_step
        if self.step <= self.slow_until:
            time.sleep(0.05)  # workers fill their prefetch, so that look-ahead is at its bound
        if self.kill_at is not None and self.step >= self.kill_at:
            os.kill(os.getpid(), 9)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", required=True, help="JSON file with the shards")
    parser.add_argument("--out", required=True)
    parser.add_argument("--mode", choices=["default", "nodispatch", "mixin", "split"], default="default")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--save-steps", type=int, default=1000)
    parser.add_argument("--samples-per-reweight", type=int, default=16)
    parser.add_argument("--resume")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--slow-until", type=int, default=0)
    parser.add_argument("--tensorboard", action="store_true")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--no-agent", action="store_true")
    return parser.parse_args()


def build_agent() -> MixingAgent:
    torch.manual_seed(7)
    return MixingAgent(AgentConfig(statistics=FeedbackStatistics(mean=(-4.0, -4.0), std=(0.2, 0.2), count=100)))


def main() -> None:
    options = parse()
    rank = int(os.environ.get("RANK", 0))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(out / "trainer"),
        max_steps=-1 if options.epochs else options.steps,
        num_train_epochs=options.epochs or 1,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        dataloader_num_workers=options.workers,
        report_to=["tensorboard"] if options.tensorboard else [],
        save_steps=options.save_steps,
        logging_steps=2,
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        remove_unused_columns=False,
        accelerator_config={"default": {}, "mixin": {}, "nodispatch": {"dispatch_batches": False}}.get(
            options.mode, {"split_batches": True}
        ),
    )
    sampler = AgentWeightedSampler(
        json.loads(Path(options.shards).read_text()),
        agent=None if options.no_agent else build_agent(),
        samples_per_reweight=options.samples_per_reweight,
        seed=3,
        transform=lambda sample: {
            "input_ids": torch.as_tensor(sample["input_ids.npy"].astype("int64")),
            "labels": torch.as_tensor(sample["input_ids.npy"].astype("int64")),
            "key": zlib.crc32(sample["__key__"].encode()),
        },
        progress=False,
        cache_dir=out.parent / "cache",
    )
    environment = Environment.from_pairs(
        {
            "general": [("abc def", "ghi"), ("x", "yz yz")],
            "math": [("1 + 1", "2"), ("3 * 3", "9 9 9")],
        },
        lambda text: [ord(c) % VOCABULARY for c in text],
        progress=False,
        prefix_token_id=0,
    )
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
    recorder = Recorder(out / f"seen-{rank}.jsonl", options.slow_until, options.kill_at)
    callback = DataMixingCallback(sampler, environment)
    trainer_class = MixingTrainer if options.mode == "mixin" else Trainer
    trainer = trainer_class(model=model, args=arguments, train_dataset=sampler, callbacks=[callback, recorder])
    trainer.train(resume_from_checkpoint=options.resume)
    result = {
        "consumed": callback.consumed,
        "ledger": sampler.ledger.to_json(),
        "log_history": trainer.state.log_history,
        "global_step": trainer.state.global_step,
        "weights": sum(float(p.detach().double().sum()) for p in model.parameters()),
        "end": sampler.end,
    }
    (out / f"result-{rank}.json").write_text(json.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
