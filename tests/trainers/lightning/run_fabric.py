"""A loop under Lightning Fabric, as docs/trainers/lightning.md shows it, that takes down what each rank is trained on.

torchrun --nproc-per-node 2 run_fabric.py FOLDER STEPS  (it continues from FOLDER/checkpoint, and saves there)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from dmagent_loader import AgentWeightedSampler, Environment, Mixing, MixingDataLoader, ReadingConfig
from dmagent_loader.transforms import packed_tokens

QUESTIONS = {"general": [("The sky is", "blue")], "math": [("1 + 1 =", "2")]}


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Embedding(256, 16), torch.nn.Linear(16, 256))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.layers(tokens)


def main() -> None:
    folder, steps = Path(sys.argv[1]), int(sys.argv[2])
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto")
    fabric.launch()
    shards = json.loads((folder / "shards.json").read_text())
    reading = ReadingConfig(progress=False, cache_dir=folder / "cache")
    sampler = AgentWeightedSampler(
        shards, policy="influence", samples_per_reweight=32, transform=packed_tokens, reading=reading
    )
    environment = Environment.from_pairs(QUESTIONS, lambda text: list(text.encode()))
    mixing = Mixing(sampler, environment)
    network = Network()
    model, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=1e-2))
    loader = fabric.setup_dataloaders(MixingDataLoader(sampler, batch_size=4))
    state = {"model": model, "optimizer": optimizer, "mixing": mixing}
    if (folder / "checkpoint").exists():
        fabric.load(folder / "checkpoint", state)

    def decide() -> None:
        if mixing.due():
            mixing.reweight(
                lambda environment: environment.evaluate(model),
                measure=lambda environment, rows, settings: environment.influence(
                    network, rows, optimizer=optimizer, **settings
                ),
            )

    mixing.begin()
    decide()
    seen = []
    for batch in loader:
        logits = model(batch["input_ids"])
        fabric.backward(
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        )
        optimizer.step()
        optimizer.zero_grad()
        seen.append(batch["__index__"].tolist())
        mixing.consumed += len(batch["input_ids"]) * fabric.world_size
        decide()
        if len(seen) == steps:
            break
    fabric.save(folder / "checkpoint", state)
    found = {
        "seen": seen,
        "mixes": [entry.mix for entry in sampler.ledger],
        "policies": [entry.decided_by for entry in sampler.ledger],
        "weights": float(sum(p.double().abs().sum() for p in network.parameters())),
    }
    (folder / f"rank{fabric.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
