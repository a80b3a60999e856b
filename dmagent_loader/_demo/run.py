"""The demo from beginning to end: text -> tokenizer -> shards -> base model -> four continual runs -> report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dmagent_loader import ReadingConfig
from dmagent_loader._demo.config import DEFAULT_AGENT, DemoConfig
from dmagent_loader._demo.corpus import Corpus, write_corpus
from dmagent_loader._demo.language_model import Rows, held_out_loss, new_model, packed_rows, pretrain, train_tokenizer
from dmagent_loader._demo.methods import MethodResult, methods, run_method
from dmagent_loader._demo.progress import Phase
from dmagent_loader._demo.python_corpus import build_python_corpus
from dmagent_loader._demo.results import Scores, as_json, domain_table, reading_notes, score_table
from dmagent_loader._demo.user_corpus import read_user_corpus
from dmagent_loader._report import html
from dmagent_loader._report.charts import overview_chart, png_bytes
from dmagent_loader._report.tables import Table
from dmagent_loader._version import __version__
from dmagent_loader.agent import MixingAgent
from dmagent_loader.agent.checkpoint import is_plus
from dmagent_loader.environment import Environment
from dmagent_loader.errors import ConfigurationError, require_extra
from dmagent_loader.mixture.domains import FIELDS, SOURCE, TARGET
from dmagent_loader.sampler import AgentWeightedSampler
from dmagent_loader.shards import ShardCollection, load_manifest
from dmagent_loader.shards.writing.config import ShardingConfig
from dmagent_loader.shards.writing.writer import shard_files
from dmagent_loader.transforms import packed_tokens

MARKER = "demo.json"
"""First file written into the output folder; only a folder with this file is overwritten."""

_VERSIONS = ("torch", "transformers", "tokenizers", "numpy", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class DemoReport:
    """The results of the demo.

    Attributes:
        table: The final table.
        notes: Notes on how to read it.
        files: Content of a file -> its path.
        seconds: Duration of the whole demo.
    """

    table: Table
    notes: list[str]
    files: dict[str, Path]
    seconds: float


def run_demo(
    output: Path,
    *,
    data: Path | None = None,
    target: str | None = None,
    agent: str = DEFAULT_AGENT,
    config: DemoConfig | None = None,
) -> DemoReport:
    """Runs the demo and writes its report.

    Args:
        output: Folder for all results: new, empty, or that of an earlier demo, which is overwritten.
        data: Text of the user, see `user_corpus`; None: the text of the Python installation.
        target: Target folder of `data` to use; None: the first.
        agent: Name, path or Hub id of the agent's checkpoint.
        config: Sizes; None: the defaults.

    Raises:
        ConfigurationError: The output folder holds other files, or the text cannot be used.
        MissingExtraError: A package of the extra ``demo`` is not installed.
        CheckpointError: The agent cannot be loaded.
    """
    for package in ("transformers", "accelerate", "tokenizers", "matplotlib"):
        require_extra(package, "demo")
    config = config or DemoConfig()
    started = time.perf_counter()
    # First, because a wrong name should not cost minutes of training.
    loaded = agent if is_plus(agent) else MixingAgent.from_pretrained(agent)
    _prepare(output)
    threads = torch.get_num_threads()
    torch.set_num_threads(min(config.num_threads, os.cpu_count() or 1))
    try:
        return _run(output, data, target, loaded, config, started)
    finally:
        torch.set_num_threads(threads)


def _run(
    output: Path,
    data: Path | None,
    target: str | None,
    agent: MixingAgent | str,
    config: DemoConfig,
    started: float,
) -> DemoReport:
    with Phase("collecting text") as phase:
        if data is None:
            corpus = build_python_corpus(config, phase.update)
        else:
            corpus = read_user_corpus(data, config, target, phase.update)
        chars = sum(len(text) for texts in corpus.documents.values() for text in texts)
        phase.note(f"{chars / 1e6:.1f} million characters, {len(corpus.documents)} domains")
    for note in corpus.notes:
        print(textwrap.indent(textwrap.fill(note, width=77), "  "))
    documents, questions = write_corpus(corpus, output / "corpus")

    with Phase("tokenizer") as phase:
        tokenizer = train_tokenizer((t for texts in corpus.documents.values() for t in texts), config.vocab_size)
        tokenizer.save_pretrained(output / "base_model")
        phase.note(f"{len(tokenizer)} tokens")
    with Phase("packed shards") as phase:
        packing = ShardingConfig(
            tokenizer=str(output / "base_model"), sequence_length=config.row_tokens, shuffle_seed=None
        )
        shard_files({name: [path] for name, path in documents.items()}, output / "shards", packing, progress=False)
        shards = load_manifest(output / "shards")
        held_out = _held_out_rows(corpus, output / "base_model", config)
        phase.note(f"rows of {config.row_tokens} tokens in {len(shards)} domains")
    environment = Environment.from_files(questions, tokenizer, progress=False)

    model = new_model(config, len(tokenizer))
    scores = [_scores("untrained", model, environment, held_out, dict.fromkeys(FIELDS, 0))]
    source = {name: urls for name, urls in shards.items() if name.startswith(f"{SOURCE}/")}
    sampler = _base_sampler(source, config, output)
    with Phase("base model, source only", total=config.base_steps) as phase:

        def show(loss: float) -> None:
            phase.update()
            phase.note(f"loss {loss:.2f}")

        pretrain(model, _batches(sampler, config.batch_rows), config, show)
    model.save_pretrained(output / "base_model")
    base_tokens = config.base_steps * config.batch_rows * config.row_tokens
    scores.append(_scores("base model (before)", model, environment, held_out, {SOURCE: base_tokens, TARGET: 0}))
    before, after = (row.held_out[SOURCE] for row in scores)
    print(f"  held-out source loss {before:.2f} -> {after:.2f} nats, {model.num_parameters() / 1e6:.1f}M parameters")

    rows = ShardCollection.open(shards, cache_dir=output / "shard_index", progress=False).num_rows
    results = []
    for method in methods(corpus.space, dict(zip(shards, rows.tolist(), strict=True)), agent):
        result = run_method(method, model, shards, environment, config, output)
        used = {field: sum(result.tokens[name] for name in corpus.domains_of(field)) for field in FIELDS}
        scores.append(_scores(method.name, result.model, environment, held_out, used))
        results.append(result)
    return _report(output, corpus, environment, scores, results, agent, config, started)


def _prepare(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ConfigurationError(f"{str(output)!r} is a file: pass a folder with --output")
    if output.is_dir() and any(output.iterdir()) and not (output / MARKER).is_file():
        raise ConfigurationError(
            f"the folder {str(output)!r} holds files that are not from a demo, and the demo would mix its own with "
            "them: pass a new or empty folder with --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    for name in ("corpus", "shards", "shard_index", "base_model", "trainer"):
        if (output / name).is_dir():
            shutil.rmtree(output / name)
    (output / MARKER).write_text("{}\n", encoding="utf-8")


def _held_out_rows(corpus: Corpus, tokenizer_folder: Path, config: DemoConfig) -> dict[str, Rows]:
    """At most `config.held_out_rows` rows of each field, evenly spaced over its held-out documents."""
    rows = {}
    for field, documents in corpus.held_out.items():
        packed = packed_rows(tokenizer_folder, documents, config.row_tokens)
        if not len(packed):
            raise ConfigurationError(
                f"the held-out documents of field {field!r} do not fill one row of {config.row_tokens} tokens, so the "
                "loss of the field cannot be measured: add documents"
            )
        count = min(config.held_out_rows, len(packed))
        rows[field] = packed[np.arange(count) * len(packed) // count]
    return rows


def _base_sampler(shards: Mapping[str, Sequence[str]], config: DemoConfig, output: Path) -> AgentWeightedSampler:
    """The source domains in their natural shares, in another order than in the runs: the seed differs."""
    return AgentWeightedSampler(
        shards,
        seed=config.seed + 1,
        transform=packed_tokens,
        reading=ReadingConfig(cache_dir=output / "shard_index", progress=False),
    )


def _batches(sampler: AgentWeightedSampler, batch_rows: int) -> Iterator[Rows]:
    stream = iter(sampler)
    while True:
        yield np.stack([next(stream)["input_ids"] for _ in range(batch_rows)])


def _scores(
    name: str, model: Any, environment: Environment, held_out: Mapping[str, Rows], tokens: Mapping[str, int]
) -> Scores:
    likelihoods = environment.log_likelihoods(model)
    return Scores(
        name=name,
        questions={field: scored.sums / scored.num_tokens for field, scored in likelihoods.items()},
        held_out={field: held_out_loss(model, rows) for field, rows in held_out.items()},
        tokens=dict(tokens),
    )


def _report(
    output: Path,
    corpus: Corpus,
    environment: Environment,
    scores: list[Scores],
    results: list[MethodResult],
    agent: MixingAgent | str,
    config: DemoConfig,
    started: float,
) -> DemoReport:
    table, notes = score_table(scores), reading_notes(scores)
    records = [result.record for result in results]
    budget = f"{config.run_tokens / 1000:.0f} thousand tokens"
    chart = png_bytes(
        overview_chart(
            records,
            corpus.space,
            x_label="tokens trained on (thousands)",
            title=f"Four continual runs of one base model, {budget} each",
        )
    )
    files = {
        "report": output / "report.html",
        "chart": output / "chart.png",
        "numbers": output / "results.json",
        "text": output / "corpus",
        "shards": output / "shards",
        "base model": output / "base_model",
    }
    seconds = time.perf_counter() - started
    decisions = [s for result in results if result.record.name == "agent" for s in result.decision_seconds]
    settings = {
        "text": corpus.title,
        "agent": agent
        if isinstance(agent, str)
        else f"{agent.name}, standardisation of feedback: {agent.config.standardization}",
        **{name.replace("_", " "): f"{value:,}" for name, value in asdict(config).items()},
        "questions asked": ", ".join(f"{field} {count}" for field, count in environment.num_questions.items()),
        "seconds of the demo": f"{seconds:.0f}",
        "share of the runs spent on evaluation": _percent(
            sum(r.evaluation_seconds for r in results), sum(r.seconds for r in results)
        ),
        "milliseconds of one decision of the agent (median)": f"{1000 * float(np.median(decisions)):.1f}",
    }
    problems = [f"{r.record.name}: the policy failed after {p}" for r in results for p in r.problems]
    versions = {"dmagent_loader": __version__, "Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _VERSIONS}
    details = [*corpus.notes, *problems]
    tokens = domain_table(corpus.space, {r.record.name: r.tokens for r in results})
    done = _what_was_done(corpus, config, budget, results[0].model.num_parameters(), isinstance(agent, MixingAgent))
    page = html.page(
        "Data Mixing Agent: a demonstration",
        [
            html.table_section("Before and after", table, notes=notes),
            html.picture_section(
                "The mix and the feedback over the runs",
                chart,
                description="Above: share of each domain in the tokens of each run. Below: feedback of each run.",
            ),
            html.notes_section("What was done", [*done, *details]),
            html.table_section("Tokens of each domain", tokens),
            html.table_section(
                "Files", _listing("content", "path", {name: str(path.resolve()) for name, path in files.items()})
            ),
            html.table_section("Settings", _listing("setting", "value", settings)),
            html.table_section("Versions", _listing("package", "version", versions)),
        ],
        summary=f"A small language model, continually pre-trained in four ways on {corpus.title}.",
    )
    files["report"].write_text(page, encoding="utf-8")
    files["chart"].write_bytes(chart)
    numbers = {**as_json(scores, records), "settings": settings, "versions": versions, "notes": [*notes, *details]}
    files["numbers"].write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    return DemoReport(table=table, notes=[*notes, *problems], files=files, seconds=seconds)


def _what_was_done(
    corpus: Corpus, config: DemoConfig, budget: str, num_parameters: int, reads_names: bool
) -> list[str]:
    base_tokens = config.base_steps * config.batch_rows * config.row_tokens
    topics = sum(domain.topic is not None for domain in corpus.space.domains)
    if not reads_names:
        knowledge = "The agent corrects the mix of influence, which was measured on the base model."
    elif not topics:
        knowledge = (
            "No domain is named after a topic that the agent knows, so the agent sets only the weights of the two "
            "fields; inside a field the domains keep their natural shares."
        )
    else:
        knowledge = (
            f"{topics} of {len(corpus.space)} domains are named after a topic that the agent knows; the agent treats "
            "each other domain as a blend of all topics."
        )
    return [
        f"A base model of {num_parameters / 1e6:.1f}M parameters was trained on {base_tokens:,} tokens of the source "
        "field alone.",
        f"Then four copies of it were trained on {budget} each, with the same settings and seed: on the target field "
        "only; on both fields, half and half; in a mix that the agent chose again after every "
        f"{config.samples_per_reweight * config.row_tokens:,} tokens; and in the mix that the measured influence of "
        "each domain on the questions speaks for, with 30% of the target field.",
        "The runs read packed shards through AgentWeightedSampler into a Hugging Face Trainer with DataMixingCallback.",
        knowledge,
        "The tokenizer was trained on both fields. Domains repeat when they are used up, so all runs get the same "
        "number of tokens.",
    ]


def _listing(name: str, value: str, entries: Mapping[str, str]) -> Table:
    return Table(columns=(name, value), rows=list(entries.items()), numeric=False)


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}"
