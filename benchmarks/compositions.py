"""What an agent does with measured, guessed and no compositions, against those that are known.

    python -m benchmarks.compositions --data DATA --output FOLDER

DATA holds ``source/TOPIC.jsonl.gz`` and ``target_math/*.jsonl.gz``. Documents of several topics are merged into the
domains of `DOMAINS`, whose true compositions are therefore known; the classifier was trained on none of them. The same
agent decides `DECISIONS` times on the same
feedback; only its knowledge of the domains differs. No model is trained.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.influence.train_topics import HELD_OUT_EVERY, documents
from dmagent_loader import AgentWeightedSampler, ReadingConfig
from dmagent_loader.labelling import Labeller, LinearClassifier, ShardDocuments, compose
from dmagent_loader.mixture.domains import CANONICAL_TOPICS
from dmagent_loader.mixture.simplex import total_variation
from dmagent_loader.shards import ShardCollection, load_manifest, shard_files

DOMAINS = {
    "source/crawl": {
        "News": 200,
        "Shopping": 175,
        "Health": 150,
        "Sports": 125,
        "Arts_and_Entertainment": 125,
        "Travel_and_Transportation": 100,
        "Finance": 75,
        "People_and_Society": 50,
    },
    "source/forum": {
        "Games": 175,
        "Computers_and_Electronics": 175,
        "Online_Communities": 150,
        "Autos_and_Vehicles": 100,
    },
    "source/howto": {
        "Food_and_Drink": 150,
        "Home_and_Garden": 150,
        "Beauty_and_Fitness": 100,
        "Hobbies_and_Leisure": 100,
    },
    "source/books": {"Books_and_Literature": 175, "Science": 150, "Law_and_Government": 150},
}
"""Domain -> topic -> number of documents."""
GUESS = {
    "source/crawl": {"News": 1.0},
    "source/forum": {"Online_Communities": 1.0},
    "source/howto": {"Home_and_Garden": 1.0},
    "source/books": {"Books_and_Literature": 1.0},
}
"""What one would think: the topic that the name of the domain brings to mind."""
DECISIONS = 40


def shards(data: Path, folder: Path) -> Path:
    """Shards of the merged domains, and of mathematics as the only target domain."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, labels = documents(data)
    held: dict[str, list[str]] = {topic: [] for topic in CANONICAL_TOPICS}
    for number in range(HELD_OUT_EVERY - 1, len(texts), HELD_OUT_EVERY):
        held[CANONICAL_TOPICS[labels[number]]].append(texts[number])
    files: dict[str, list[str]] = {}
    for name, topics in DOMAINS.items():
        path = folder / f"{name.split('/')[1]}.jsonl"
        lines = []
        for topic, count in topics.items():
            assert len(held[topic]) >= count, f"{topic} has {len(held[topic])} held-out documents"
            lines += [json.dumps({"text": text}) + "\n" for text in held[topic][:count]]
        path.write_text("".join(lines), encoding="utf-8")
        files[name] = [str(path)]
    files["target/math"] = [str(data / "target_math" / "math_train.jsonl.gz")]
    if not (folder / "shards").exists():
        shard_files(files, folder / "shards", progress=False)
    return folder / "shards"


def mixes(folder: Path, compositions: Any) -> np.ndarray[Any, Any]:
    """The agent's mixes: (`DECISIONS`, D)."""
    sampler = AgentWeightedSampler(
        folder,
        agent="dmagent-rl",
        samples_per_reweight=64,
        compositions=compositions,
        reading=ReadingConfig(progress=False),
    )
    found = []
    for step in range(DECISIONS):
        part = step / (DECISIONS - 1)
        feedback = {"general": -4.0 + 0.1 * np.sin(6 * part), "math": -5.0 + 0.8 * part}
        decision = sampler.reweight(feedback, consumed=64 * step)
        found.append([decision.proposed[name] for name in sampler.space.names])
        for _ in itertools.islice(sampler, 64):
            pass
    return np.array(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    logging.getLogger("dmagent_loader").setLevel(logging.ERROR)
    folder = shards(arguments.data, arguments.output)
    collection = ShardCollection.open(load_manifest(folder), progress=False)
    labeller = Labeller(LinearClassifier.bundled())
    measured, sampled = {}, {}
    for number, name in enumerate(DOMAINS):
        composition = compose(name, ShardDocuments(collection, number), labeller, progress=False)
        measured[name], sampled[name] = composition.shares, composition.documents
    known = {name: {t: n / sum(topics.values()) for t, n in topics.items()} for name, topics in DOMAINS.items()}
    for name in DOMAINS:
        true, found = (np.array([x[name].get(topic, 0.0) for topic in CANONICAL_TOPICS]) for x in (known, measured))
        error = total_variation(true, found)
        print(f"{name}: {sampled[name]} documents sampled, total variation from the known composition {error:.3f}")
    truth = mixes(folder, known)
    print(
        f"{'compositions':14}",
        "  ".join(f"{name:>13}" for name in [*DOMAINS, "target/math"]),
        "  total variation from known",
    )
    for label, given in (("known", known), ("measured", measured), ("guessed", GUESS), ("none", None)):
        found = truth if given is known else mixes(folder, given)
        away = np.mean([total_variation(a, b) for a, b in zip(found, truth, strict=True)])
        print(f"{label:14}", "  ".join(f"{share:13.1%}" for share in found.mean(axis=0)), f"{away:10.3f}")


if __name__ == "__main__":
    main()
