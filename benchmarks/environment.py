"""Questions per second of an evaluation, against lm-evaluation-harness on the same requests and the same model.

    python benchmarks/environment.py --data ../shared/data

Without DATA the question sets of the demo are asked, which come from the Python installation.

The same log-likelihoods are asked of `Environment` and of lm-evaluation-harness (`HFLM.loglikelihood`), each at several
batch sizes, in rounds of random order, on one thread; the fastest setting of each is compared, and the numbers must be
equal. Models have random weights: their time does not depend on what they know.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from measuring import Aim, aims_table, interleaved, median, parser, save, seconds, table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dmagent_loader._demo.config import DemoConfig
from dmagent_loader._demo.python_corpus import build_python_corpus
from dmagent_loader.environment import Environment

FIELDS = {
    "general (long question, short answer)": "env/mmlu_val_500.jsonl.gz",
    "math (short question, long solution)": "env/math_train_500.jsonl.gz",
}
HARNESS_BATCHES = (1, 4, 16)
OUR_TOKENS = (512, 1024, 2048)
SIDES = ("lm-eval", "ours")
AIM = 2.0
TOLERANCE = 1e-4


def gpt2() -> transformers.PreTrainedModel:
    """0.8M parameters of layers beside 6.4M of a tied output layer."""
    config = transformers.GPT2Config(vocab_size=50_257, n_embd=128, n_layer=4, n_head=4, n_positions=1024)
    return transformers.GPT2LMHeadModel(config)


def llama() -> transformers.PreTrainedModel:
    """4.7M parameters of layers beside 8.2M of an output layer."""
    config = transformers.LlamaConfig(
        vocab_size=32_000,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return transformers.LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], transformers.PreTrainedModel]] = {"GPT-2, 50k tokens": gpt2, "LLaMA, 32k tokens": llama}


def pairs(folder: Path | None, number: int) -> dict[str, list[tuple[str, str]]]:
    """Field -> questions and answers."""
    if folder is None:
        corpus = build_python_corpus(DemoConfig(questions=max(number, DemoConfig.questions)))
        return {name: [(q.question, q.answer) for q in asked[:number]] for name, asked in corpus.questions.items()}
    return {field: _stored(folder / file)[:number] for field, file in FIELDS.items()}


def _stored(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["question"], row["answer"]) for row in rows]


def tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE of the questions' own text, about as long in tokens as with a large vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


def compare(model: Any, words: Any, asked: list[tuple[str, str]], repeats: int) -> dict[str, Any]:
    """Seconds of each setting of each side, and how far their numbers are apart."""
    from lm_eval.models.huggingface import HFLM

    environments = {
        tokens: Environment.from_pairs({"field": asked}, words, progress=False, batch_tokens=tokens)
        for tokens in OUR_TOKENS
    }
    first = environments[OUR_TOKENS[0]]
    requests = [SimpleNamespace(args=request) for request in first.requests["field"]]
    works: dict[str, Callable[[], Any]] = {}
    for size in HARNESS_BATCHES:
        harness = HFLM(pretrained=model, tokenizer=words, batch_size=size, logits_cache=False)
        works[f"lm-eval, batch {size}"] = lambda harness=harness: [
            total for total, _ in harness.loglikelihood(requests, disable_tqdm=True)
        ]
    for tokens, ours in environments.items():
        works[f"ours, {tokens} tokens"] = lambda ours=ours: ours.log_likelihoods(model)["field"].sums
    answers = {name: np.array(work()) for name, work in works.items()}  # a warm-up, too
    lengths = first.log_likelihoods(model)["field"].num_tokens
    (harness_name, *_), ours_name = works, f"ours, {OUR_TOKENS[0]} tokens"
    apart = float(np.abs((answers[ours_name] - answers[harness_name]) / lengths).max())
    assert apart < TOLERANCE, f"the two disagree by {apart} nats a token"
    timed = {name: (lambda work=work: seconds(work)) for name, work in works.items()}
    measured = {"questions": len(asked), "apart": apart, "seconds": interleaved(timed, repeats)}
    settings = {side: f"{side}, {best(measured, side)[0]}" for side in SIDES}
    return {**measured, "layers": {side: in_layers(model, works[name]) for side, name in settings.items()}}


def in_layers(model: Any, work: Callable[[], Any]) -> float:
    """Share of the time of an evaluation that the model's own layers take, without its output layer."""
    spent, started = 0.0, 0.0

    def begin(*_: object) -> None:
        nonlocal started
        started = time.perf_counter()

    def end(*_: object) -> None:
        nonlocal spent
        spent += time.perf_counter() - started

    hooks = [model.base_model.register_forward_pre_hook(begin), model.base_model.register_forward_hook(end)]
    whole = seconds(work)
    for hook in hooks:
        hook.remove()
    return spent / whole


def best(measured: dict[str, Any], side: str) -> tuple[str, float]:
    """The fastest setting of one side, and its median."""
    times = {name: median(values) for name, values in measured["seconds"].items() if name.startswith(side)}
    name = min(times, key=times.__getitem__)
    return name.partition(", ")[2], times[name]


def ratio(measured: dict[str, Any]) -> float:
    harness, ours = (best(measured, side)[1] for side in SIDES)
    return harness / ours


def aims(results: dict[str, Any]) -> list[Aim]:
    """At least twice as many questions per second, with the same numbers."""
    found = {name: ratio(measured) for name, measured in results.items()}
    least = min(found, key=found.__getitem__)
    words = f"{found[least]:.2f} to {max(found.values()):.2f} times (least: {least})"
    return [Aim(f"evaluation >= {AIM:g} times as fast as lm-evaluation-harness", words, found[least] >= AIM)]


def section(results: dict[str, Any]) -> str:
    """Markdown of this program's section."""
    rows = []
    for name, measured in results.items():
        (harness, slow), (own, fast) = (best(measured, side) for side in SIDES)
        number, layers = measured["questions"], measured["layers"]
        cells = (number / slow, harness, f"{layers['lm-eval']:.0%}", number / fast, own, f"{layers['ours']:.0%}")
        rows.append((name, *cells, ratio(measured), f"{measured['apart']:.1e}"))
    sides = [column for side in SIDES for column in (f"{side}, questions/s", "at", "in layers")]
    header = ("model, field", *sides, "ratio", "nats a token apart")
    return "\n\n".join(
        [
            "## Evaluation",
            "The same requests to the same model on one thread, each side with its fastest settings. This package "
            "applies the output layer to scored positions alone, so it gains most if questions are long, answers are "
            "short, and the vocabulary is large compared with the model. *In layers*: share of the time spent in the "
            "model's own layers; the rest of ours is mostly the output layer at the scored positions, with softmax. "
            "If most positions are scored, neither can be avoided.",
            table(header, rows),
            aims_table(aims(results)),
        ]
    )


def main() -> None:
    options = parser(__doc__, "environment")
    folder = os.environ.get("DMAGENT_DATA")
    options.add_argument("--data", type=Path, default=folder, help="with env/*.jsonl.gz (default: $DMAGENT_DATA)")
    options.add_argument("--questions", type=int, default=60, help="of each field (default: %(default)s)")
    args: argparse.Namespace = options.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    number = 6 if args.quick else args.questions
    asked = pairs(args.data, number)
    words = tokenizer([text for field in asked.values() for pair in field for text in pair])
    results = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()
        for field, listed in asked.items():
            results[f"{name}, {field}"] = compare(model, words, listed, 1 if args.quick else args.repeats)
    save(args, results)
    print(section(results))


if __name__ == "__main__":
    main()
