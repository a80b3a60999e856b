"""`Environment.influence`: the effect of each domain on each field, measured on the current model.

The model, its gradients, its modes, the optimizer and all random states are restored bit for bit. If memory is short,
smaller calls are tried, then the method that needs less memory. The result's notes and the log record each fallback.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from dmagent_loader._distributed import all_reduce_max, get_rank, get_world_size, is_active, together
from dmagent_loader._validation import is_finite_number, shown, whole_number
from dmagent_loader.environment.batches import BATCH_TOKENS, DEFAULT_BATCH_TOKENS, ScoredWindow
from dmagent_loader.environment.calling import LogitsOf
from dmagent_loader.environment.ghost import NoRule
from dmagent_loader.environment.gradients import Flat, Parameters, adam_moments, untouched
from dmagent_loader.environment.influence_ways import (
    MIXED_ROWS,
    SHARED,
    STEP,
    Probe,
    ShortOfMemory,
    ghost_way,
    gradient_way,
    reverse_way,
)
from dmagent_loader.environment.scoring import Model, Scorer, unwrap
from dmagent_loader.errors import ConfigurationError, InfluenceError
from dmagent_loader.mixture.influence import Influence, estimate, grouped, scores_from
from dmagent_loader.mixture.simplex import FloatArray

logger = logging.getLogger(__name__)

Way = Literal["gradient", "ghost", "reverse"]


@dataclass(frozen=True, kw_only=True)
class InfluenceSettings:
    """Settings for measuring influence.

    Args:
        way: Method, ``"gradient"``, ``"ghost"`` or ``"reverse"``, see `influence_ways`.
        max_questions: Maximum number of questions per field, evenly spaced. None: all.
        question_groups: G, number of groups that the different questions of a field are split into for the standard
            error; fewer if a field has fewer. The gradient and ghost methods store one gradient of the model per group
            and field.
        row_groups: Maximum number of groups that a domain's rows are split into for the standard error of the gradient
            method, each at the cost of at least one backward pass. The other methods score each row separately.
        max_row_tokens: Maximum number of tokens read per row. None: the model's maximum length.
        batch_tokens: Maximum number of tokens per model call, including padding; a longer row gets a call of its own.
            None: the environment's setting.
        step: Root mean square of the virtual change of a parameter, for the reverse method.
        damping: Constant added to the root second moments of the preconditioner, as a fraction of their root mean
            square. It limits the effect of parameters that the rows hardly change.

    Raises:
        ConfigurationError: A value is invalid.
    """

    way: Way = "gradient"
    max_questions: int | None = 256
    question_groups: int = 4
    row_groups: int = 8
    max_row_tokens: int | None = None
    batch_tokens: int | None = None
    step: float = 3e-4
    damping: float = 0.1

    def __post_init__(self) -> None:
        if self.way not in get_args(Way):
            raise ConfigurationError(
                f"unknown way {shown(self.way)} of measuring influence; choose one of {list(get_args(Way))}"
            )
        for name in ("max_questions", "question_groups", "row_groups", "max_row_tokens", "batch_tokens"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), least=1)
        for name in ("question_groups", "row_groups"):
            whole_number(name, getattr(self, name), least=1)
        for name, least in (("step", 0.0), ("damping", 0.0)):
            value = getattr(self, name)
            if not is_finite_number(value) or value < least or (name == "step" and value == 0):
                raise ConfigurationError(f"{name} is {shown(value)}; it must be a positive number")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> InfluenceSettings:
        """Builds settings from a mapping; missing entries keep their defaults.

        Raises:
            ConfigurationError: A value is invalid or a name is unknown.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise ConfigurationError(f"InfluenceSettings has no settings {unknown}; choose from {names}")
        return cls(**settings)


def measure(
    model: Model,
    questions: Mapping[str, Sequence[ScoredWindow]],
    rows: Mapping[str, Sequence[ScoredWindow]],
    settings: InfluenceSettings,
    *,
    optimizer: object = None,
    logits_of: LogitsOf | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> Influence:
    """Measures the influence of each domain on each field; see `Environment.influence`.

    Args:
        model: Model as in `Environment.influence`.
        questions: Field -> its questions.
        rows: Domain -> its rows.
        settings: Settings of the measurement.
        optimizer: Optimizer that trains the model; None: unknown.
        logits_of: See `EnvironmentSettings`.
        rank: Data-parallel rank of this process; None: its rank in the default process group.
        world_size: Number of data-parallel ranks; None: the size of the default process group.

    Raises:
        InfluenceError: Influence cannot be measured here; the message gives the reason. Use question topics instead.
        ConfigurationError: The model has no trainable parameters, or none of the domains has several rows.
        RankError: Another rank failed, or the ranks have different questions or rows.
    """
    started = time.perf_counter()
    model = unwrap(model)
    with together(STEP, shared=SHARED) as facts:
        parameters = Parameters(model)
        asked = [spread(listed, settings.max_questions) for listed in questions.values()]
        numbers = [_distinct(listed) for listed in asked]
        count = min(settings.question_groups, *(max(numbered) + 1 for numbered in numbers))
        groups = [_dealt(listed, numbered, count) for listed, numbered in zip(asked, numbers, strict=True)]
        if is_active():
            facts["the rows of the domains"] = [(name, len(r), _digest(r)) for name, r in rows.items()]
            facts["the settings of the influence"] = settings
    if count == 1 < settings.question_groups and get_rank() == 0:
        single = [name for name, numbered in zip(questions, numbers, strict=True) if max(numbered) == 0]
        logger.info(
            "%s has a single question, so the errors of the influence on all fields leave out the choice of questions, "
            "and chance may pass for a difference between domains: ask at least %d different questions of each field",
            " and ".join(map(repr, single)),
            settings.question_groups,
        )
    scorer = Scorer(model, logits_of)
    batch_tokens = settings.batch_tokens or BATCH_TOKENS.get(scorer.device.type, DEFAULT_BATCH_TOKENS)
    longest = max(entry.num_inputs for listed in (*asked, *rows.values()) for entry in listed)
    way, notes = settings.way, []
    while True:
        probe = Probe(
            parameters=parameters,
            scorer=scorer,
            questions=groups,
            rows=rows,
            rank=get_rank() if rank is None else rank,
            world_size=get_world_size() if world_size is None else world_size,
            batch_tokens=batch_tokens,
            damping=settings.damping,
        )
        try:
            with untouched(parameters.model), _no_cached_casts():
                samples, used_moments = _samples(probe, way, settings, optimizer)
            break
        except NoRule as error:
            note, short = f"the ghost method does not apply to this model: {error}", False
        except ShortOfMemory:
            note, short = f"the {way} method was short of memory with {batch_tokens} tokens per call", True
        # Outside the handler: the error's traceback keeps the tensors of the attempt alive.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not short:
            way = "gradient"
        elif batch_tokens > longest:
            batch_tokens = max(longest, batch_tokens // 4)
        elif way != "reverse":
            way = "reverse"
        else:
            raise InfluenceError(
                f"{note}, the smallest possible, so influence cannot be measured: free memory (shorter rows by "
                "max_row_tokens=, fewer trainable parameters), or use the policy 'question-topics'"
            )
        notes.append(note)
        if get_rank() == 0:
            logger.warning("%s: trying the %s method with %d tokens", note, way, batch_tokens)
    sizes = [np.array([len(group) for group in listed]) for listed in groups]
    weights = [size / size.sum() for size in sizes]
    values, errors, by_group = estimate(samples, weights)
    if not np.isfinite(values).all() or not np.isfinite(errors).all():
        raise InfluenceError(
            f"{int((~np.isfinite(values)).sum())} of {values.size} scores are not finite: the model has probably "
            "diverged, or its gradients overflow; check its loss, and measure in bfloat16 or float32"
        )
    influence = Influence(
        scores=scores_from(tuple(questions), tuple(rows), values, errors),
        way=way,
        by_questions=grouped(tuple(questions), by_group) if count > 1 else {},
        rows={name: len(listed) for name, listed in rows.items()},
        questions={name: len(listed) for name, listed in zip(questions, asked, strict=True)},
        tokens=_tokens(asked, rows, way, count, used_moments),
        seconds=_slowest_rank(time.perf_counter() - started),
        notes=tuple(notes),
    )
    logger.log(
        logging.INFO if get_rank() == 0 else logging.DEBUG,
        "influence of %d domains on %s (%s method, preconditioned by %s): %d tokens in %.2f s",
        len(rows),
        list(questions),
        way,
        "the optimizer's second moments" if used_moments else "mean squared gradients",
        influence.tokens,
        influence.seconds,
    )
    return influence


def _samples(probe: Probe, way: Way, settings: InfluenceSettings, optimizer: object) -> tuple[list[FloatArray], bool]:
    """Samples of one method, and whether the optimizer's moments were used."""
    moments: Flat | None = probe.on_all_ranks(lambda: adam_moments(optimizer, probe.parameters))
    if all_reduce_max(int(moments is None), STEP):
        moments = None  # An optimizer that is sharded over ranks: all ranks use the same preconditioner, or none.
    denominators = moments or probe.root_mean_squares()
    if way == "gradient":
        return gradient_way(probe, denominators, settings.row_groups), moments is not None
    if way == "ghost":
        return ghost_way(probe, denominators), moments is not None
    return reverse_way(probe, denominators, settings.step), moments is not None


@contextmanager
def _no_cached_casts() -> Iterator[None]:
    """Under autocast, cached casts of the weights would hide the virtual steps of the reverse method."""
    cached = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_cache_enabled(cached)


def _slowest_rank(seconds: float) -> float:
    """The same number on all ranks, to the millisecond: it is part of a state that ranks compare."""
    return all_reduce_max(round(1000 * seconds), STEP) / 1000


def spread(windows: Sequence[ScoredWindow], most: int | None) -> list[ScoredWindow]:
    """At most `most` windows, evenly spaced; None: all."""
    if most is None or most >= len(windows):
        return list(windows)
    return [windows[number * len(windows) // most] for number in range(most)]


def _distinct(windows: Sequence[ScoredWindow]) -> list[int]:
    """The number of each window among the different ones; copies have the same."""
    numbers: dict[tuple[int, bytes], int] = {}
    return [numbers.setdefault((entry.num_scored, entry.tokens.tobytes()), len(numbers)) for entry in windows]


def _dealt(windows: Sequence[ScoredWindow], numbers: Sequence[int], count: int) -> list[list[ScoredWindow]]:
    """Windows in groups; all copies of one are in the same, because groups that share a question agree for no reason.

    Args:
        windows: Windows of one field.
        numbers: `_distinct` of them.
        count: Number of groups, at most that of the different windows.
    """
    groups: list[list[ScoredWindow]] = [[] for _ in range(count)]
    for entry, number in zip(windows, numbers, strict=True):
        groups[number % count].append(entry)
    return groups


def _tokens(
    questions: Sequence[Sequence[ScoredWindow]],
    rows: Mapping[str, Sequence[ScoredWindow]],
    way: Way,
    groups: int,
    used_moments: bool,
) -> int:
    """Cost of the measurement in forward-pass tokens; a backward pass counts as two forward passes."""
    asked = sum(entry.num_inputs for listed in questions for entry in listed)
    read = sum(entry.num_inputs for listed in rows.values() for entry in listed)
    mixed = 0 if used_moments else min(read, read * MIXED_ROWS // sum(map(len, rows.values())))
    forward_only = read * (1 + groups * len(questions))
    return 3 * (asked + mixed) + (forward_only if way == "reverse" else 3 * read)


def _digest(windows: Sequence[ScoredWindow]) -> str:
    digest = hashlib.sha256()
    for entry in windows:
        digest.update(entry.num_scored.to_bytes(8, "little") + entry.tokens.tobytes())
    return digest.hexdigest()[:16]
