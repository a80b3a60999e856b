"""The ways of measuring influence against training clones: accuracy, noise, time, memory, and how soon it goes stale.

    python -m benchmarks.influence.ways --data DATA --work build/influence --output build/influence/ways.jsonl

Truth: clones of the model trained on one domain alone, two streams of rows that no way reads, scored on questions that
no way reads. A finished measurement is a line of the output and is not repeated.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.agent.rank_correlation import spearman
from benchmarks.influence.environments import Setting, base_weights, layered, one_thread, probe_rows, setting
from benchmarks.influence.probes import CLONE_RATE, CLONE_ROWS, NAMES, clone_gains, clone_seconds
from benchmarks.influence.runs import STREAMS, TOKENS_PER_STEP
from dmagent_loader.mixture.domains import FIELDS
from dmagent_loader.mixture.influence import Influence
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.language_model import ProxyModel
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.tasks.library import SIZES, proxy_config

ENVIRONMENTS = (("piqa", "gsm8k"), ("mmlu", "math"))
VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "gradient, 8 rows": (8, {}),
    "gradient, 32 rows": (32, {}),
    "gradient, 128 rows": (128, {}),
    "gradient, 32 rows, 64 questions": (32, {"max_questions": 64}),
    "gradient, 32 rows, damping 0.01": (32, {"damping": 0.01}),
    "gradient, 32 rows, no preconditioner": (32, {"damping": 1e3}),
    "ghost, 8 rows": (8, {"way": "ghost"}),
    "ghost, 32 rows": (32, {"way": "ghost"}),
    "ghost, 128 rows": (128, {"way": "ghost"}),
    "reverse, 32 rows": (32, {"way": "reverse"}),
    "reverse, 32 rows, 1 group": (32, {"way": "reverse", "question_groups": 1}),
    "reverse, 32 rows, step 1e-3": (32, {"way": "reverse", "step": 1e-3}),
}
COMPARED: dict[str, dict[str, Any]] = {
    "gradient": {},
    "ghost": {"way": "ghost"},
    "reverse": {"way": "reverse", "question_groups": 1},
}
"""Settings of the ways whose cost and agreement are measured in turn."""
DRAWS = 2
MARKS = (0, 10, 20, 40, 80)
"""Steps of a run on the natural mix after which influence is measured again."""


def correlations(one: FloatArray, other: FloatArray, domains: list[str]) -> dict[str, float]:
    """Spearman's rank correlation of two (K, D) scores, for each question field over the domains of each data field."""
    found = {}
    for k, question_field in enumerate(("keep", "acquire")):
        for field in FIELDS:
            here = [i for i, name in enumerate(domains) if name.startswith(f"{field}/")]
            found[f"{question_field}, {field} domains"] = round(float(spearman(one[k, here], other[k, here])), 3)
    return found


def truth(found: Setting, weights: dict[str, Tensor], work: Path, size: str) -> list[FloatArray]:
    """Gains of the scored questions from training clones: (K, D) for each of two streams."""
    path = work / "probes" / f"{found.name}-{size}-truth.json"
    if not path.exists():
        config = ProxyConfig(
            **{**vars(proxy_config(size)), "learning_rate": CLONE_RATE, "warmup_updates": 1, "averaging": 0.0}
        )
        before = found.scored.feedback(ProxyModel(proxy_config(size), weights).proxies)[0]
        streams = []
        for stream in (900, 901):
            gains = []
            for rows in probe_rows(found.corpus, rows=CLONE_ROWS, number=stream, domains=found.domains).values():
                trainer = ProxyTrainer(1, config, start=weights)
                trainer.train(torch.from_numpy(rows[None]))
                gains.append((found.scored.feedback(trainer.model)[0] - before).tolist())
            streams.append(np.array(gains).T.tolist())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(streams))
    return [np.array(stream) for stream in json.loads(path.read_text())]


def peak_memory(action: Any) -> tuple[Any, int]:
    """What an action returns, and by how many bytes the process grew at most meanwhile.

    Linux only. Memory that was freed before is given back to the system first: what is used again would not count.
    """
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    result = action()
    return result, _status("VmHWM") - before


def measure(found: Setting, model: nn.Module, rows: int, draw: int, settings: dict[str, Any]) -> tuple[Influence, int]:
    """An influence and the memory that it took."""
    listed = probe_rows(found.corpus, rows=rows, number=draw, domains=found.domains)
    by_domain = {NAMES[domain]: list(tokens) for domain, tokens in listed.items()}
    return peak_memory(lambda: found.environment.influence(model, by_domain, **settings))


def compare(
    found: Setting, weights: dict[str, Tensor], work: Path, output: Path, size: str, variants: Sequence[str]
) -> None:
    """Variants against the truth."""
    model = layered(proxy_config(size), weights)
    domains = [NAMES[domain] for domain in found.domains.tolist()]
    known = truth(found, weights, work, size)
    mean = np.mean(known, axis=0)
    done = {(line["environment"], line["size"], line["way"]) for line in records.lines(output)}
    for name in variants:
        rows, settings = VARIANTS[name]
        if (found.name, size, name) in done:
            continue
        draws = [measure(found, model, rows, draw, settings) for draw in range(DRAWS)]
        values = [influence.values() for influence, _ in draws]
        add(
            output,
            environment=found.name,
            size=size,
            way=name,
            against_clones=mean_correlations(values, mean, domains),
            between_draws=correlations(values[0], values[1], domains),
            error_over_spread=[
                round(float(e.mean() / v.std()), 3)
                for e, v in zip(draws[0][0].errors(), draws[0][0].values(), strict=True)
            ],
            seconds=round(draws[0][0].seconds, 2),
            tokens=draws[0][0].tokens,
            peak_mb=round(max(memory for _, memory in draws) / 1e6, 1),
        )
    if (found.name, size, "clones, 32 rows") not in done:
        gains = [clone_gains(found, weights, work, size=size, stream=stream).T for stream in (100, 101)]
        add(
            output,
            environment=found.name,
            size=size,
            way="clones, 32 rows",
            against_clones=mean_correlations(gains, mean, domains),
            between_draws=correlations(gains[0], gains[1], domains),
            seconds=round(clone_seconds(found, work, size=size, stream=100), 2),
            tokens=len(domains) * (3 * CLONE_ROWS * ROW_TOKENS + found.steering.num_tokens),
        )


def cost(
    found: Setting,
    weights: dict[str, Tensor],
    output: Path,
    size: str,
    *,
    rows: int,
    questions: int,
    gains: FloatArray | None,
) -> None:
    """Time, memory and agreement of the ways, measured in turn on the same rows.

    Args:
        found: Environment.
        weights: Model.
        output: Record.
        size: Size of the model.
        rows: Rows of each domain.
        questions: Questions of each field, at most.
        gains: Mean gains from training clones, (K, D); None: not known.
    """
    label = f"cost, {rows} rows, {questions} questions"
    if (found.name, size, label) in {
        (line["environment"], line["size"], line["way"]) for line in records.lines(output)
    }:
        return
    model = layered(proxy_config(size), weights)
    domains = [NAMES[domain] for domain in found.domains.tolist()]
    measure(found, model, 2, 0, {"way": "ghost", "max_questions": 4})  # the first call imports and compiles
    results: dict[str, list[tuple[Influence, int, float]]] = {name: [] for name in COMPARED}
    for draw in range(DRAWS):
        for name, settings in COMPARED.items():
            started = time.process_time()
            influence, memory = measure(found, model, rows, draw, {**settings, "max_questions": questions})
            results[name].append((influence, memory, time.process_time() - started))
    ways = {}
    for name, listed in results.items():
        values = [influence.values() for influence, _, _ in listed]
        base = results["gradient"][0][0].values()
        ways[name] = {
            "cpu_seconds": round(min(seconds for _, _, seconds in listed), 2),
            "tokens": listed[0][0].tokens,
            "peak_mb": round(max(memory for _, memory, _ in listed) / 1e6, 1),
            "against_gradient": correlations(values[0], base, domains),
            "between_draws": correlations(values[0], values[1], domains),
            "error_over_spread": [
                round(float(e.mean() / v.std()), 3) for e, v in zip(listed[0][0].errors(), values[0], strict=True)
            ],
        }
        if gains is not None:
            ways[name]["against_clones"] = mean_correlations(values, gains, domains)
    add(output, environment=found.name, size=size, way=label, ways=ways)


def mean_correlations(values: Sequence[FloatArray], gains: FloatArray, domains: list[str]) -> dict[str, float]:
    """Mean over draws of the correlations with the gains from clones."""
    each = [correlations(value, gains, domains) for value in values]
    return {part: round(float(np.mean([one[part] for one in each])), 3) for part in each[0]}


def age(found: Setting, weights: dict[str, Tensor], output: Path, size: str) -> None:
    """Influence at later steps of a run on the natural mix, against that at its start on other rows."""
    if (found.name, size, "age") in {
        (line["environment"], line["size"], line["way"]) for line in records.lines(output)
    }:
        return
    domains = [NAMES[domain] for domain in found.domains.tolist()]
    trainer = ProxyTrainer(1, proxy_config(size), start=weights)
    rows = MixStream(
        found.corpus, rows_per_step=TOKENS_PER_STEP // ROW_TOKENS, row_tokens=ROW_TOKENS, seed=1, number=STREAMS
    )
    mix = 0.7 * found.corpus.start_state + 0.3 * found.corpus.target_distribution
    start, _ = measure(found, layered(proxy_config(size), weights), 32, 50, {})
    found_at = {}
    for step in range(max(MARKS) + 1):
        if step in MARKS:
            model = layered(proxy_config(size), trainer.averaged.state_dict())
            influence, _ = measure(found, model, 32, 51 + MARKS.index(step), {})
            found_at[step] = correlations(influence.values(), start.values(), domains)
        trainer.train(torch.from_numpy(rows.next(mix)[None]))
    add(output, environment=found.name, size=size, way="age", against_start=found_at)


def add(output: Path, **line: Any) -> None:
    """One line more."""
    records.add(output, line)
    print(json.dumps(line), flush=True)


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/influence"))
    parser.add_argument("--output", type=Path, default=Path("build/influence/ways.jsonl"))
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["0.06M", "0.16M", "0.7M"])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--without-clones", action="store_true", help="only time, memory and agreement of the ways")
    parser.add_argument("--rows", type=int, default=32, help="rows of each domain for time, memory and agreement")
    parser.add_argument("--questions", type=int, default=256, help="questions of each field for the same")
    parser.add_argument("--base-tokens", type=int, default=1_500_000, help="tokens that the base model is trained on")
    arguments = parser.parse_args()
    one_thread()
    for size in arguments.sizes:
        for keep, acquire in ENVIRONMENTS:
            found = setting(keep, acquire, arguments.data, arguments.work)
            weights = base_weights(found.corpus, arguments.work, size=size, tokens=arguments.base_tokens)
            gains = None if arguments.without_clones else np.mean(truth(found, weights, arguments.work, size), axis=0)
            cost(
                found,
                weights,
                arguments.output,
                size,
                rows=arguments.rows,
                questions=arguments.questions,
                gains=gains,
            )
            if arguments.without_clones:
                continue
            compare(found, weights, arguments.work, arguments.output, size, arguments.variants)
            age(found, weights, arguments.output, size)


if __name__ == "__main__":
    main()
