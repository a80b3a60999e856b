"""Question sets to keep and to acquire, from a data folder: which model is trained, on what, and what it is asked.

Each set is split in halves: policies and probes read one, scores are of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dmagent_loader.environment import Environment, EnvironmentSettings
from dmagent_loader.mixture.domains import NUM_CANONICAL
from dmagent_loader.mixture.simplex import IntArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.spaces import ROW_TOKENS
from dmagent_loader.training.data.streams import MixStream
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.questions import ProxyQuestions, QuestionConfig
from dmagent_loader.training.tasks.library import MOST_KEPT, TaskLibrary
from dmagent_loader.training.tasks.library import base_weights as library_base_weights
from dmagent_loader.training.tasks.simulator import ASKED, PROBE_STREAMS
from dmagent_loader.training.tasks.spec import BaseModel

KEEP = (
    "mmlu",
    "piqa",
    "hellaswag",
    "sciq",
    "arc",
    "openbookqa",
    "socialiqa",
    "commonsenseqa",
    "boolq",
    "winogrande",
)
CODE = {"mbpp", "humaneval"}

TOLD = (
    ("mmlu", "math"),
    ("piqa", "gsm8k"),
    ("hellaswag", "gsm8k"),
    ("sciq", "gsm8k"),
    ("mmlu", "mbpp"),
    ("arc", "gsm8k"),
    ("openbookqa", "gsm8k"),
    ("socialiqa", "gsm8k"),
    ("commonsenseqa", "gsm8k"),
    ("boolq", "gsm8k"),
    ("winogrande", "gsm8k"),
    ("piqa", "mbpp"),
    ("sciq", "math"),
    ("hellaswag", "humaneval"),
    ("mmlu", "svamp"),
    ("arc", "mathqa"),
)
"""Environments of the table, the most telling ones first."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One environment, ready to train.

    Args:
        name: ``KEEP+ACQUIRE``.
        corpus: Tokens of the 52 domains.
        environment: The half that policies and probes read, as users' environments are.
        steering: The same half, for all proxies at once.
        asked: As many of it as the bundled agent was trained with, which reads them after every step.
        scored: The other half.
    """

    name: str
    corpus: Corpus
    environment: Environment
    steering: ProxyQuestions
    asked: ProxyQuestions
    scored: ProxyQuestions

    @property
    def fields(self) -> tuple[str, ...]:
        """Keep first, then acquire."""
        return self.environment.fields

    @property
    def domains(self) -> IntArray:
        """Numbers of the domains that hold rows."""
        return np.flatnonzero(self.corpus.num_tokens > ROW_TOKENS)


def layered(config: ProxyConfig, weights: Mapping[str, Tensor]) -> LlamaForCausalLM:
    """The same model as `ProxyModel` in layers of its own, as users' models are."""
    e, f, heads = config.width, config.feed_forward, config.heads
    with torch.random.fork_rng():
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=config.vocab_size,
                hidden_size=e,
                intermediate_size=f,
                num_hidden_layers=config.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                max_position_embeddings=ROW_TOKENS,
                rms_norm_eps=1e-6,
                tie_word_embeddings=True,
            )
        )
    one = {name: tensor[0] for name, tensor in weights.items()}
    loaded = {"model.embed_tokens.weight": one["embedding"], "model.norm.weight": one["final_norm"][0]}
    for layer in range(config.layers):
        parts = {
            **dict(zip(("q_proj", "k_proj", "v_proj"), torch.split(one[f"qkv.{layer}"], e, dim=1), strict=True)),
            "o_proj": one[f"out.{layer}"],
        }
        loaded |= {f"model.layers.{layer}.self_attn.{name}.weight": part.T for name, part in parts.items()}
        gate, up = torch.split(one[f"gate_up.{layer}"], f, dim=1)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": one[f"down.{layer}"]}
        loaded |= {f"model.layers.{layer}.mlp.{name}.weight": part.T for name, part in parts.items()}
        loaded[f"model.layers.{layer}.input_layernorm.weight"] = one[f"attention_norm.{layer}"][0]
        loaded[f"model.layers.{layer}.post_attention_layernorm.weight"] = one[f"mlp_norm.{layer}"][0]
    loaded["lm_head.weight"] = loaded["model.embed_tokens.weight"]
    model.load_state_dict(loaded)
    return model


@functools.cache
def library(data: Path, work: Path) -> TaskLibrary:
    """Text and questions, made once and then read from `work`."""
    return TaskLibrary(data, work)


def base_weights(setting_corpus: Corpus, work: Path, *, size: str, tokens: int = 1_500_000) -> dict[str, Tensor]:
    """A base model that was trained on the natural mix of the source field; trained once, then read from `work`."""
    base = BaseModel(size=size, tokens=tokens)
    return library_base_weights(setting_corpus, base, setting_corpus.start_state, work)


def setting(keep: str, acquire: str, data: Path, work: Path) -> Setting:
    """An environment by the names of its question sets."""
    target = "code" if acquire in CODE else "math"
    made = library(data, work)
    found = made.corpus(target)
    tokenizer = found.tokenizer()
    halves = {keep: made.questions(target, keep, "keep"), acquire: made.questions(target, acquire, "acquire")}
    read, scored = ({name: getattr(half, side) for name, half in halves.items()} for side in ("read", "scored"))
    config = QuestionConfig(max_tokens=ROW_TOKENS, max_questions=MOST_KEPT, batch_tokens=512)
    settings = EnvironmentSettings(score="pair", cloze=True, max_length=ROW_TOKENS, progress=False, batch_tokens=512)
    return Setting(
        name=f"{keep}+{acquire}",
        corpus=found,
        environment=Environment(read, tokenizer, settings),
        steering=ProxyQuestions(read, tokenizer, config),
        asked=ProxyQuestions(read, tokenizer, replace(config, max_questions=ASKED)),
        scored=ProxyQuestions(scored, tokenizer, config),
    )


def probe_rows(source: Corpus, *, rows: int, number: int, domains: IntArray) -> dict[int, np.ndarray[Any, Any]]:
    """Rows of each domain for probes: number of the domain -> (rows, `ROW_TOKENS` + 1)."""
    found = {}
    for domain in domains.tolist():
        stream = MixStream(source, rows_per_step=rows, row_tokens=ROW_TOKENS, seed=0, number=PROBE_STREAMS + number)
        found[domain] = stream.next(np.eye(NUM_CANONICAL)[domain])
    return found


def one_thread() -> None:
    """Proxies this small gain nothing from a second thread."""
    torch.set_num_threads(1)
