"""Report and model card of ``dmagent train-agent plus``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.training.cards import FRONT_MATTER
from dmagent_loader.training.plus.sampling import KINDS
from dmagent_loader.training.plus.scores import Scores


def report(checks: Mapping[str, float], scores: Mapping[str, Sequence[Scores]], chosen: int, median: int) -> str:
    """Tables of a training, as Markdown.

    Args:
        checks: Rank correlations of the surrogate on runs that were not fitted.
        scores: Split -> scores of the untrained network and of each training.
        chosen: Number of the training that was chosen.
        median: Number of the median training.
    """
    parts = ["# Training of dmagent-plus\n", "Rank correlation of simulated and real final gains:\n"]
    parts += ["| runs that were not fitted | Spearman |", "|---|---:|"]
    parts += [f"| {name} | {value:.2f} |" for name, value in checks.items()]
    parts.append(
        "\nAdvantage over the influence policy on surrogate tasks (reward, as a share of the attainable range; mean ± "
        "standard error over tasks):\n"
    )
    for name, listed in scores.items():
        parts += [_table(name, listed, chosen, median), ""]
    return "\n".join(parts)


def _table(name: str, listed: Sequence[Scores], chosen: int, median: int) -> str:
    lines = [f"| {name} | mean | worst | below -0.03 | {' | '.join(KINDS)} |", "|---|" + "---:|" * (3 + len(KINDS))]
    for number, own in enumerate(listed, start=-1):
        label = "untrained" if number < 0 else f"training {number}"
        label += " (chosen)" * (number == chosen) + " (median)" * (number == median)
        found = own.advantages
        error = found.std(ddof=1) / np.sqrt(len(found))
        cells = [f"{found.mean():+.3f} ± {error:.3f}", f"{found.min():+.2f}", f"{(found < -0.03).mean():.0%}"]
        cells += [f"{own.mean(kind):+.3f}" for kind in KINDS]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    means = np.array([own.mean() for own in listed[1:]])
    spread = means.std(ddof=1) if len(means) > 1 else float("nan")
    return "\n".join(lines) + f"\n\nSpread of the {len(means)} trainings: {means.mean():+.3f}, sd {spread:.3f}.\n"


def card(network: PlusNetwork, tables: str, notes: str) -> str:
    """Text of the checkpoint's README.md."""
    return f"""{FRONT_MATTER}
# dmagent-plus

A network of {network.num_parameters():,} parameters that corrects the mix of the influence policy at each decision. It
works with any number of domains of any names, and needs a measurement of influence.

```python
sampler = AgentWeightedSampler("shards/manifest.json", agent="dmagent-plus", decisions=80)
```

It was trained by evolution strategies on an analytic surrogate of runs, which is calibrated on recorded runs of small
proxies. docs/agent-plus.md describes the training and the results on real proxies.

{notes.strip()}

{tables.replace("# Training", "## Training", 1)}
"""
