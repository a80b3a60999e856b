"""Evolution strategies for the network of `dmagent-plus`, on surrogate tasks, from rewards at the end of runs alone.

OpenAI-ES (arXiv 1703.03864): at each generation, mirrored Gaussian perturbations of the weights are ranked by utility
on the same tasks with the same noise, the ranks are centred, and Adam follows the estimated gradient.

    utility = mean over tasks of (g - harm_weight max(0, -g - tolerance)),    g = reward - influence policy's reward

Shapes: P weights, N pairs of perturbations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from dmagent_loader.agent.plus.network import PlusNetwork
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.plus.surrogate import Decide, SurrogateTasks, ranges, rewards, rollout, static
from dmagent_loader.training.run_folder import claim, save_tensors

STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class EvolutionConfig:
    """Settings of a training.

    Args:
        generations: Number of generations.
        pairs: N, mirrored pairs of a generation.
        sigma: Standard deviation of a perturbation.
        learning_rate: Step of Adam.
        decay: Decay of the weights towards their start, per generation.
        harm_weight: Weight of a loss beyond `tolerance` against the influence policy.
        tolerance: Loss against the influence policy that counts no extra, as a share of the attainable range.
        batches: Batches of tasks in a generation.
        save_every: Generations between two saved states.
    """

    generations: int = 60
    pairs: int = 8
    sigma: float = 0.1
    learning_rate: float = 0.04
    decay: float = 0.002
    harm_weight: float = 2.0
    tolerance: float = 0.03
    batches: int = 2
    save_every: int = 10


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A batch of tasks with the rewards of the influence policy.

    Args:
        tasks: The tasks.
        attainable: (B, K), see `surrogate.ranges`.
        reference: (B,), rewards of the influence policy at the target share that it has by default.
    """

    tasks: SurrogateTasks
    attainable: FloatArray
    reference: FloatArray

    @classmethod
    def of(cls, tasks: SurrogateTasks) -> Judged:
        """Adds what all policies of these tasks are compared with."""
        attainable = ranges(tasks)
        gains = rollout(tasks, static(tasks.facts.prior), 0).gains
        return cls(tasks=tasks, attainable=attainable, reference=rewards(tasks, gains, attainable))

    def advantages(self, decide: Decide, seed: int) -> FloatArray:
        """g of the module docstring: (B,)."""
        gains = rollout(self.tasks, decide, seed).gains
        return rewards(self.tasks, gains, self.attainable) - self.reference


def evolve(
    batches: Sequence[Judged],
    config: EvolutionConfig,
    seed: int,
    directory: Path,
    *,
    on_generation: Callable[[int, float], None] = lambda generation, utility: None,
) -> PlusNetwork:
    """Trains a network; a training that was stopped continues from its last saved state.

    Args:
        batches: Batches of training tasks, of which each generation reads `config.batches`.
        config: Settings.
        seed: Seed of the network, the perturbations and the choice of batches.
        directory: Folder of the state.
        on_generation: Called after each generation, with its number and the mean utility of its networks.

    Raises:
        StateError: The folder holds a training with other settings.
    """
    claim(directory, {**asdict(config), "seed": seed, "batches_of_tasks": len(batches)}, "a training")
    network = PlusNetwork.untrained(seed)
    start = network.vector()
    center, first, second, done = start.copy(), np.zeros_like(start), np.zeros_like(start), 0
    if (directory / STATE).exists():
        state = load_file(directory / STATE)
        center, first, second = state["center"], state["first"], state["second"]
        done = int(state["done"][0])
    for generation in range(done, config.generations):
        rng = np.random.default_rng([seed, generation])
        chosen = [batches[i] for i in rng.permutation(len(batches))[: config.batches]]
        noise = rng.normal(size=(config.pairs, len(center)))
        both = np.concatenate([noise, -noise])
        utilities = np.array(
            [utility(network.with_vector(center + config.sigma * step), chosen, config, generation) for step in both]
        )
        ranks = utilities.argsort().argsort() / (len(utilities) - 1) - 0.5
        gradient = ranks @ both / (len(utilities) * config.sigma)
        first = 0.9 * first + 0.1 * gradient
        second = 0.99 * second + 0.01 * gradient**2
        corrected = first / (1 - 0.9 ** (generation + 1)), second / (1 - 0.99 ** (generation + 1))
        center = center + config.learning_rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        center = center + config.decay * (start - center)
        on_generation(generation, float(utilities.mean()))
        if (generation + 1) % config.save_every == 0 or generation + 1 == config.generations:
            state = {"center": center, "first": first, "second": second, "done": np.array([generation + 1])}
            save_tensors(directory / STATE, {name: torch.from_numpy(value) for name, value in state.items()})
    return network.with_vector(center)


def utility(network: PlusNetwork, batches: Sequence[Judged], config: EvolutionConfig, seed: int) -> float:
    """Utility of the module docstring, over all tasks of some batches."""
    decide = network.in_float32().mix
    found = np.concatenate([batch.advantages(decide, seed) for batch in batches])
    harm = np.maximum(0.0, -found - config.tolerance)
    return float((found - config.harm_weight * harm).mean())
