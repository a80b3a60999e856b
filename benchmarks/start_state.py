"""How many texts of a model's own tell what it was trained on: Fig. 4 of the paper, with small models and a known mix.

    python -m benchmarks.start_state --data DATA --output docs/images/start_state.png --results FILE.json

DATA holds ``source/TOPIC.jsonl.gz``. Small models are trained from scratch on documents of `MIX`. Each then writes
texts from its start token alone, which are classified as the documents are. The plot shows the KL divergence of the
documents' shares from those of the first n texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmagent_loader._demo.language_model import train_tokenizer
from dmagent_loader.labelling.generation import GenerationConfig, generate_texts
from dmagent_loader.labelling.linear import LinearClassifier
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import read_documents

MIX = {
    "Sports": 0.25,
    "Food_and_Drink": 0.2,
    "Finance": 0.15,
    "Health": 0.12,
    "Games": 0.1,
    "Computers_and_Electronics": 0.08,
    "Law_and_Government": 0.06,
    "Pets_and_Animals": 0.04,
}
DOCUMENTS = 8000
VOCABULARY, CONTEXT, BATCH = 2048, 96, 16
MODELS = {"small": (64, 1, 1500), "larger": (128, 2, 1500)}
"""Name -> width, number of layers, training steps."""
TEXTS = 4000
SMOOTHING = 0.5
"""Count added to every topic, so that the divergence is finite where a topic has no text yet."""


def training_documents(data: Path) -> list[str]:
    """Documents in the proportions of `MIX`, shuffled."""
    texts = []
    for topic, share in MIX.items():
        found = itertools.islice(read_documents(data / "source" / f"{topic}.jsonl.gz"), round(share * DOCUMENTS))
        texts += list(found)
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def rows_of(texts: list[str], tokenizer: Any) -> torch.Tensor:
    """The beginning of each document after the start token, padded with end tokens: (N, `CONTEXT`)."""
    end = tokenizer.eos_token_id
    encoded = [[end, *ids[: CONTEXT - 2], end] for ids in tokenizer(texts, verbose=False)["input_ids"]]
    return torch.tensor([ids + [end] * (CONTEXT - len(ids)) for ids in encoded])


def trained(name: str, rows: torch.Tensor, vocabulary: int) -> tuple[Any, float]:
    """A LLaMA-style model after its steps on the rows, and its loss."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width, layers, steps = MODELS[name]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    mean = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 100, 1.1 - step / steps)
        batch = rows[torch.randint(len(rows), (BATCH,))]
        labels = batch.clone()
        repeated = (batch[:, 1:] == 0) & (batch[:, :-1] == 0)
        labels[:, 1:][repeated] = -100  # padding
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if step == 0 else 0.99 * mean + 0.01 * loss.item()
        if step % 250 == 0:
            print(f"{name}: step {step}, loss {mean:.3f}", flush=True)
    return model, mean


def divergences(truth: FloatArray, labels: FloatArray) -> tuple[list[int], list[float]]:
    """KL(truth || shares of the first n texts) by n."""
    numbers = [n for n in (50, 100, 200, 400, 700, 1000, 1500, 2000, 3000, 4000) if n <= len(labels)]
    found = []
    for n in numbers:
        counts = np.bincount(labels[:n].astype(int), minlength=len(truth)) + SMOOTHING
        shares, held = counts / counts.sum(), truth > 0
        found.append(float((truth[held] * np.log(truth[held] / shares[held])).sum()))
    return numbers, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    arguments = parser.parse_args()
    classifier = LinearClassifier.bundled()
    texts = training_documents(arguments.data)
    tokenizer = train_tokenizer(texts, VOCABULARY)
    rows = rows_of(texts, tokenizer)
    truth = classifier.shares([tokenizer.decode(row, skip_special_tokens=True) for row in rows.tolist()])
    results: dict[str, Any] = {"mix": MIX, "documents": len(texts), "models": {}}
    for name in MODELS:
        model, loss = trained(name, rows, len(tokenizer))
        config = GenerationConfig(max_tokens=CONTEXT - 2, batch_size=200)
        written = list(itertools.islice(generate_texts(model, tokenizer, config), TEXTS))
        labels = classifier.predict(written)
        numbers, found = divergences(truth, labels)
        sure = float((classifier.probabilities(written).max(axis=1) >= 0.6).mean())
        results["models"][name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": MODELS[name][2],
            "loss": loss,
            "texts": numbers,
            "kl": found,
            "share_with_confidence_0.6": sure,
        }
        print(name, loss, list(zip(numbers, found, strict=True)), sure, flush=True)
        arguments.results.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, arguments.output)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the divergence by number of texts."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, found in results["models"].items():
        label = f"{name}: {found['parameters'] / 1e6:.2f}M parameters, loss {found['loss']:.1f}"
        axes.plot(found["texts"], found["kl"], marker="o", label=label)
    axes.axhline(0.1, color="0.6", linestyle="--", linewidth=1)
    axes.set(xscale="log", xlabel="texts that the model wrote", ylabel="KL divergence, nats", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
