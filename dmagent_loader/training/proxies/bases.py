"""Base models, from which proxies continue pre-training (extension; the paper's proxies start from scratch).

An agent steers models that already know the source field and may forget it. Proxies that start untrained cannot show
this: their feedback only rises. So each trajectory starts from a base model that was pre-trained on the source field
with the trajectory's own start state. There are several start states, so that the agent does not memorise one.

Shapes: S base models, D = 52 domains.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from dmagent_loader.errors import ConfigurationError
from dmagent_loader.mixture.domains import NUM_CANONICAL, NUM_TOPICS
from dmagent_loader.mixture.simplex import FloatArray
from dmagent_loader.training.data.corpus import Corpus
from dmagent_loader.training.data.streams import TrajectoryStream
from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer
from dmagent_loader.training.run_folder import claim, save_tensors

FIRST_STREAM = 2_000_000
"""Stream number of the first base model; trajectories are numbered from 0, so the two read different rows."""
STATE_FILE = "state.safetensors"
"""Name of the file that holds the state of the training."""
SAVE_EVERY = 50
"""Steps between two saves of that state."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """Settings of the base models.

    Args:
        models: S, number of base models and of start states.
        tokens: Source tokens that each model is trained on; 0: untrained proxies, as in the paper.
        learning_rate: Learning rate of AdamW.
        rows_per_update: Rows of one optimiser update.
        sharpness: k of the start states after the first, drawn from Dirichlet(k * 26 * natural shares); a small k gives
            skewed states.
        seed: Seed of start states, weights and data.

    Raises:
        ConfigurationError: There are no models, tokens are negative, or `sharpness` is not positive.
    """

    models: int = 4
    tokens: int = 2_000_000
    learning_rate: float = 3e-3
    rows_per_update: int = 8
    sharpness: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.models < 1 or self.tokens < 0 or self.sharpness <= 0:
            raise ConfigurationError(
                f"{self.models} base models on {self.tokens} tokens with sharpness {self.sharpness}: there must be one "
                "or more, tokens cannot be negative, sharpness must be positive"
            )


def start_states(natural: FloatArray, config: BaseConfig) -> FloatArray:
    """The start states: the natural shares first, then random ones around them.

    Args:
        natural: (52,), 0 on target domains.
        config: Settings.

    Returns:
        (S, 52), rows sum to 1.
    """
    rng = np.random.default_rng([config.seed, 0])
    states = np.zeros((config.models, NUM_CANONICAL))
    states[0] = natural
    present = np.flatnonzero(natural[:NUM_TOPICS])
    for state in states[1:]:
        state[present] = rng.dirichlet(config.sharpness * NUM_TOPICS * natural[present])
    return states


def train_bases(
    corpus: Corpus,
    states: FloatArray,
    config: BaseConfig,
    proxy: ProxyConfig,
    directory: Path,
    *,
    row_tokens: int,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict[str, Tensor]:
    """Trains one base model on each start state; all begin with the same random weights.

    Args:
        corpus: Tokens of the 52 domains.
        states: (S, 52) start states.
        config: Settings.
        proxy: Size of a model; its `rows_per_update` and `learning_rate` are replaced by those of `config`.
        directory: Folder for the state of the training; a second call with the same arguments continues from it.
        row_tokens: Tokens of a row.
        device: See `ProxyTrainer`.
        progress: Whether to show a progress bar.

    Returns:
        Weights, (S, ...) each: the moving averages, if the proxies have them.

    Raises:
        StateError: `directory` holds base models of other settings or data.
        ConfigurationError: `config.tokens` is less than one step takes.
    """
    rows_per_step = 4 * config.rows_per_update
    steps = config.tokens // (rows_per_step * row_tokens)
    if config.tokens and not steps:
        raise ConfigurationError(
            f"{config.tokens} tokens are less than one step of {rows_per_step * row_tokens}: the base models would not "
            "be trained; give more tokens, or 0 for untrained ones"
        )
    identity = {
        "bases": asdict(config),
        "proxy": asdict(proxy),
        "row_tokens": row_tokens,
        "corpus": corpus.fingerprint,
        "states": states.tolist(),
    }
    claim(directory, identity, "base models")
    proxy = replace(proxy, rows_per_update=config.rows_per_update, learning_rate=config.learning_rate)
    trainer = ProxyTrainer(len(states), proxy, device=device)
    path = directory / STATE_FILE
    done = 0
    if path.exists():
        saved = load_file(str(path))
        done = int(saved.pop("step"))
        trainer.load_state(saved)
    if done < steps:
        streams = [
            TrajectoryStream(
                corpus,
                np.tile(state, (steps + 1, 1)),
                rows_per_step=rows_per_step,
                row_tokens=row_tokens,
                seed=config.seed,
                number=FIRST_STREAM + number,
            )
            for number, state in enumerate(states)
        ]
        with tqdm(total=steps, initial=done, desc="base models", unit="step", disable=not progress) as bar:
            for step in range(done + 1, steps + 1):
                trainer.train(torch.from_numpy(np.stack([stream.rows(step) for stream in streams])))
                if step % SAVE_EVERY == 0 or step == steps:
                    save_tensors(path, {**trainer.state(), "step": torch.tensor(step)})
                bar.update()
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer.averaged.state_dict().items()}
