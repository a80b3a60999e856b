"""Continual pre-training with real, generated and no source data: the loss of the source field afterwards.

    python -m benchmarks.synthetic_source --data DATA --results benchmarks/results/synthetic_source.json

DATA holds ``source/TOPIC.jsonl.gz`` and ``target_math/*.jsonl.gz``. A small base model is trained on source documents
of eight topics. It then writes texts by itself, which take the way of docs/topics.md to shards: `dmagent generate`,
`filter`, `label --split` and `shard`. Its real training documents take the same way, without `generate`. From the base
model, runs on a target field of mathematics read, through the sampler, `TARGET_SHARE` of their rows from it and the
rest from (a) the real source, (b) the generated source, or all from the target (c). Everything but the source is the
same. Reported: loss, nats per token, of documents that no model was trained on.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.start_state import BATCH, CONTEXT, MIX, VOCABULARY, rows_of
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader._demo.language_model import train_tokenizer
from dmagent_loader.training.data.corpus import read_documents

DOCUMENTS, HELD_OUT = 6000, 400
WIDTH, LAYERS = 64, 1
BASE_STEPS, STEPS = 1500, 300
BASE_RATE, RATE = 3e-3, 1e-3
TEXTS = 4000
TARGET_SHARE = 0.7
SEEDS = (0, 1)
CONDITIONS = ("real", "generated", "none")


def documents_of(data: Path) -> dict[str, list[str]]:
    """Source documents in the proportions of `MIX`, and target documents; both with held-out ones."""
    rng = np.random.default_rng(0)
    source: list[str] = []
    for topic, share in MIX.items():
        found = read_documents(data / "source" / f"{topic}.jsonl.gz")
        source += itertools.islice(found, round(share * (DOCUMENTS + HELD_OUT)))
    target = [text for path in sorted((data / "target_math").glob("*.jsonl.gz")) for text in read_documents(path)]
    source, target = ([texts[i] for i in rng.permutation(len(texts))] for texts in (source, target))
    return {
        "source": source[HELD_OUT:],
        "source held out": source[:HELD_OUT],
        "target": target[HELD_OUT : HELD_OUT + DOCUMENTS],
        "target held out": target[:HELD_OUT],
    }


def losses(model: Any, rows: torch.Tensor) -> torch.Tensor:
    """Mean loss of a batch of rows (N, `CONTEXT`), without padding."""
    labels = rows.clone()
    labels[:, 1:][(rows[:, 1:] == 0) & (rows[:, :-1] == 0)] = -100
    loss: torch.Tensor = model(input_ids=rows, labels=labels).loss
    return loss


def held_out(model: Any, rows: torch.Tensor) -> float:
    """Mean loss over the batches of all rows."""
    model.eval()
    with torch.inference_mode():
        found = [losses(model, batch).item() for batch in rows.split(100)]
    model.train()
    return float(np.mean(found))


def train(model: Any, batches: Iterator[torch.Tensor], steps: int, rate: float) -> None:
    """Trains for some steps: warm-up over 5%, linear decay to a tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / (0.05 * steps), 1 - 0.9 * step / steps)
        loss = losses(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)


def base_model(folder: Path, texts: list[str]) -> None:
    """Trains the base model on source documents, and saves it with its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = train_tokenizer(texts, VOCABULARY)
    rows = rows_of(texts, tokenizer)
    torch.manual_seed(0)
    settings = {"num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
    sizes = {"vocab_size": len(tokenizer), "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **settings, **ends))
    train(model, (rows[torch.randint(len(rows), (BATCH,))] for _ in itertools.count()), BASE_STEPS, BASE_RATE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def dmagent(*arguments: object) -> None:
    """Runs a command of the package."""
    print("dmagent", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "dmagent_loader", *map(str, arguments), "--no-progress"], check=True)


def write(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def prepare(work: Path, texts: dict[str, list[str]]) -> None:
    """From documents, and from the base model, to shards; what an earlier call has done is not done again."""
    if not (work / "base" / "tokenizer_config.json").exists():
        base_model(work / "base", texts["source"])
    limits = ("--max-tokens", CONTEXT - 2, "--batch-size", 200)
    dmagent("generate", work / "base", "--output", work / "generated", "--documents", TEXTS, *limits)
    files = {"real": write(work / "real.jsonl.gz", texts["source"]), "generated": work / "generated"}
    target = write(work / "target.jsonl.gz", texts["target"])
    for name, path in files.items():
        if (work / name / "shards" / "manifest.json").exists():
            continue
        out = work / name if name == "real" else work / "from model"
        shutil.rmtree(out, ignore_errors=True)
        dmagent("filter", "--domain", f"source/all={path}", "--output", out / "filtered", "--min-characters", 40)
        labels = ("--min-confidence", 0, "--split", "--output", out / "labelled")
        dmagent("label", "--input", out / "filtered/source", "--field", "source", *labels)
        dmagent("shard", "--input", out / "labelled/source", "--field", "source", "--output", out / "shards")
        dmagent("shard", "--domain", f"target/math={target}", "--output", out / "shards")


def rows_read(shards: Path, condition: str, seed: int, tokenizer: Any) -> Iterator[torch.Tensor]:
    """Batches of a run, from the sampler."""
    mix = {"target": 1.0} if condition == "none" else {"source": 1 - TARGET_SHARE, "target": TARGET_SHARE}
    sampler = AgentWeightedSampler(
        shards / "manifest.json",
        policy="natural",
        initial_mix=mix,
        seed=seed,
        transform=lambda row: {"tokens": rows_of([row["txt"]], tokenizer)[0]},
        reading=ReadingConfig(progress=False),
    )
    samples = iter(sampler)
    while True:
        yield torch.stack([sample["tokens"] for sample in itertools.islice(samples, BATCH)])


def run(work: Path, condition: str, seed: int, rows: dict[str, torch.Tensor]) -> dict[str, float]:
    """Held-out losses after a run from the base model."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(work / "base")
    model = LlamaForCausalLM.from_pretrained(work / "base")
    shards = (work / "real" if condition == "real" else work / "from model") / "shards"
    torch.manual_seed(seed)
    train(model, rows_read(shards, condition, seed, tokenizer), STEPS, RATE)
    return {name: held_out(model, found) for name, found in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="folder of the models and shards (default: a temporary one)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    from transformers import AutoTokenizer, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        texts = documents_of(args.data)
        prepare(work, texts)
        tokenizer = AutoTokenizer.from_pretrained(work / "base")
        rows = {field: rows_of(texts[f"{field} held out"], tokenizer) for field in ("source", "target")}
        model = LlamaForCausalLM.from_pretrained(work / "base")
        results: dict[str, Any] = json.loads(args.results.read_text()) if args.results.exists() else {}
        results |= {"parameters": sum(p.numel() for p in model.parameters()), "texts": TEXTS, "steps": STEPS}
        results["base"] = {name: held_out(model, found) for name, found in rows.items()}
        for seed, condition in itertools.product(SEEDS, CONDITIONS):
            runs = results.setdefault("runs", {}).setdefault(condition, {})
            if str(seed) not in runs:
                runs[str(seed)] = run(work, condition, seed, rows)
                print(condition, seed, runs[str(seed)], flush=True)
                args.results.write_text(json.dumps(results, indent=1) + "\n")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(f"{sum(u.ru_utime + u.ru_stime for u in used):.0f} seconds of CPU")
    print(table(results))


def table(results: dict[str, Any]) -> str:
    """The losses as a Markdown table: mean over the seeds, smallest to largest."""
    lines = ["| source data of the run | loss of the source field | loss of the target field |", "|---|---:|---:|"]
    base = results["base"]
    lines.append(f"| before it | {base['source']:.3f} | {base['target']:.3f} |")
    for condition, runs in results["runs"].items():
        cells = []
        for field in ("source", "target"):
            found = [losses[field] for losses in runs.values()]
            cells.append(f"{np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})")
        lines.append(f"| {condition} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
