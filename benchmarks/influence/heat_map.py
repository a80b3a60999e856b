"""Picture of which domains help which questions: docs/images/influence_heat_map.png.

    python -m benchmarks.influence.heat_map --data DATA --work build/influence

measures what is missing on the 0.16M base model, as the policy "influence" does before its first decision, and records
the scores in benchmarks/results/influence_heat_map.json. Without --data, the picture is drawn from that record.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.influence.environments import CODE, KEEP, base_weights, one_thread, setting
from benchmarks.influence.probes import measured
from benchmarks.influence.table import ROWS
from dmagent_loader._files import write_atomically
from dmagent_loader._report.charts import MUTED, TEXT, new_figure, png_bytes
from dmagent_loader.mixture.domains import CANONICAL_TOPICS, SOURCE, TARGET
from dmagent_loader.mixture.simplex import FloatArray

SIZE, STREAM = "0.16M", 0
ACQUIRED_WITH = {
    "math": "mmlu",
    "gsm8k": "piqa",
    "svamp": "mmlu",
    "mathqa": "arc",
    "mbpp": "mmlu",
    "humaneval": "hellaswag",
}
"""Questions to acquire -> the questions to keep of an environment of the table that has them."""
SIGNIFICANT = 2.0
"""Standard errors between a domain's score and the mean of its field."""
LABELS = {
    "mmlu": "MMLU",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "sciq": "SciQ",
    "arc": "ARC",
    "openbookqa": "OpenBookQA",
    "socialiqa": "SocialIQA",
    "commonsenseqa": "CommonsenseQA",
    "boolq": "BoolQ",
    "winogrande": "WinoGrande",
    "math": "MATH",
    "gsm8k": "GSM8K",
    "svamp": "SVAMP",
    "mathqa": "MathQA",
    "mbpp": "MBPP",
    "humaneval": "HumanEval",
}


def record(data: Path, work: Path) -> dict[str, Any]:
    """Question set -> field of the data -> topic -> score and standard error."""
    environments = {keep: (keep, "math" if keep == "mmlu" else "gsm8k") for keep in KEEP}
    environments |= {acquire: (keep, acquire) for acquire, keep in ACQUIRED_WITH.items()}
    found: dict[str, Any] = {}
    for questions, (keep, acquire) in environments.items():
        here = setting(keep, acquire, data, work)
        weights = base_weights(here.corpus, work, size=SIZE)
        influence = measured(here, weights, work, size=SIZE, stream=STREAM, rows=ROWS)
        field = TARGET if questions in ACQUIRED_WITH else SOURCE
        found[questions] = {
            domain.removeprefix(f"{field}/"): [round(score.value, 4), round(score.error, 4)]
            for domain, score in influence[questions].items()
            if domain.startswith(f"{field}/")
        }
        print(questions, flush=True)
    return found


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One heat map.

    Args:
        title: Above the map.
        questions: Names of the columns.
        topics: Names of the rows.
        z: (topics, questions), standard deviations from the mean of the column; NaN: the topic has no text.
        significant: (topics, questions), whether the score differs from the mean by more than its noise.
    """

    title: str
    questions: list[str]
    topics: list[str]
    z: FloatArray
    significant: Any

    @classmethod
    def of(cls, title: str, scores: dict[str, Any], topics: list[str] | None = None) -> Panel:
        """A map of some question sets; questions of alike scores stand side by side.

        Args:
            title: Above the map.
            scores: As `record` returns them.
            topics: Rows in order; None: topics of alike scores stand side by side, too.
        """
        questions = list(scores)
        rows = topics or list(CANONICAL_TOPICS)
        values, errors = (
            np.array([[scores[q].get(topic, (np.nan, np.nan))[i] for q in questions] for topic in rows]) for i in (0, 1)
        )
        distance = values - np.nanmean(values, axis=0)
        z = distance / np.nanstd(values, axis=0, ddof=1)
        left, _, right = np.linalg.svd(np.nan_to_num(z), full_matrices=False)
        sign = 1 if right[0].sum() > 0 else -1
        down = np.argsort(-sign * left[:, 0]) if topics is None else np.arange(len(rows))
        across = np.argsort(-sign * right[0])
        return cls(
            title=title,
            questions=[questions[i] for i in across],
            topics=[rows[i] for i in down],
            z=z[down][:, across],
            significant=(np.abs(distance) > SIGNIFICANT * errors)[down][:, across],
        )


def draw(scores: dict[str, Any]) -> bytes:
    """The picture: source domains for the questions to keep, target domains for the questions to acquire."""
    kept = Panel.of("Source domains,\nquestions to keep", {name: scores[name] for name in KEEP})
    math = Panel.of(
        "Target domains, questions to acquire:\nmathematics", {n: scores[n] for n in ACQUIRED_WITH if n not in CODE}
    )
    code = Panel.of("\ncode", {n: scores[n] for n in ACQUIRED_WITH if n in CODE}, math.topics)
    figure = new_figure(12.0, 9.2)
    axes = figure.subplots(1, 3, width_ratios=[10, 4.4, 2.2])
    for ax, panel in zip(axes, (kept, math, code), strict=True):
        image = _draw_panel(ax, panel)
    axes[2].set_yticks([])
    bar = figure.colorbar(image, ax=axes, location="bottom", shrink=0.45, aspect=40, pad=0.02)
    bar.set_label(
        "score, in standard deviations from the mean of the column (numbers: significant; dots: within the noise; "
        "grey: no text)",
        fontsize=9,
        color=TEXT,
    )
    bar.ax.tick_params(labelsize=8, colors=MUTED)
    figure.suptitle(
        "Which domains help which questions: influence, measured before training",
        x=0.012,
        ha="left",
        fontsize=13,
        fontweight="bold",
        color=TEXT,
    )
    return png_bytes(figure)


def _draw_panel(ax: Any, panel: Panel) -> Any:
    """Numbers where the score is significant, a dot where it is not, grey where the topic has no text."""
    ax.set_facecolor("#e6e6e6")
    image = ax.imshow(panel.z, cmap="PuOr_r", vmin=-2.5, vmax=2.5, aspect="auto")
    ax.set_title(panel.title, fontsize=10, color=TEXT, loc="left")
    ax.set_xticks(
        range(len(panel.questions)), [LABELS[q] for q in panel.questions], rotation=40, ha="right", fontsize=9
    )
    ax.set_yticks(range(len(panel.topics)), [topic.replace("_", " ") for topic in panel.topics], fontsize=9)
    ax.tick_params(length=0, colors=TEXT)
    for (row, column), z in np.ndenumerate(panel.z):
        if np.isnan(z):
            continue
        color = "white" if abs(z) > 1.6 else TEXT
        label = f"{z:+.1f}".replace("-", "\N{MINUS SIGN}") if panel.significant[row, column] else "\N{MIDDLE DOT}"
        ax.text(column, row, label, ha="center", va="center", fontsize=8, color=color)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="measure and record; without it, draw from the record")
    parser.add_argument("--work", type=Path, default=Path("build/influence"), help="for corpora, base models, probes")
    parser.add_argument("--record", type=Path, default=Path("benchmarks/results/influence_heat_map.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/influence_heat_map.png"))
    arguments = parser.parse_args()
    one_thread()
    if arguments.data is not None:
        found = record(arguments.data, arguments.work)
        write_atomically(arguments.record, (json.dumps(found, indent=1) + "\n").encode())
    write_atomically(arguments.picture, draw(json.loads(arguments.record.read_text())))


if __name__ == "__main__":
    main()
