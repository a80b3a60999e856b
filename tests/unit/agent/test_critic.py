"""The critic: candidates see the history before their step and themselves, and what is saved is what is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from dmagent_loader.agent import AgentConfig
from dmagent_loader.agent.critic import CriticConfig, MixingCritic, load_critics, save_critics
from dmagent_loader.errors import CheckpointError, ConfigurationError

SMALL = CriticConfig(num_domains=5, num_fields=2, d_model=16, num_heads=2, d_ff=24, low=-1.5, span=4.0)
B, T, N = 3, 7, 4


@pytest.fixture(scope="module")
def critic() -> MixingCritic:
    """In float64 and with large weights, so that what is not exactly independent shows."""
    torch.manual_seed(3)
    critic = MixingCritic(SMALL).double()
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.mul_(8.0 if parameter.ndim == 2 else 1.0)
    return critic


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    inputs = torch.randn(B, T, 7, generator=generator, dtype=torch.float64)
    return inputs, torch.rand(B, T, N, 5, generator=generator, dtype=torch.float64)


@torch.no_grad()
def test_a_candidate_depends_on_no_other_candidate(
    critic: MixingCritic, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """All steps and candidates at once, against each candidate alone with only the history before its step."""
    inputs, candidates = batch
    together = critic(inputs, candidates)
    assert together.shape == (B, T, N)
    assert together.std() > 0.1
    for t in range(T):
        for n in range(N):
            alone = critic(inputs[:, : t + 1], candidates[:, t : t + 1, n : n + 1])
            torch.testing.assert_close(together[:, t, n], alone[:, 0, 0], rtol=0, atol=1e-6)


def test_a_candidate_reads_its_step_s_history_and_itself_and_nothing_else(
    critic: MixingCritic, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """By gradients: catches a mask that is off by one row in either direction, and one that is merely too narrow."""
    inputs, candidates = (part.clone().requires_grad_() for part in batch)
    logit = critic(inputs, candidates)[1, 3, 2]
    to_inputs, to_candidates = torch.autograd.grad(logit, (inputs, candidates))
    read = to_inputs.abs().sum(dim=-1) > 1e-9
    assert read.nonzero().tolist() == [[1, t] for t in range(4)]
    assert (to_candidates.abs().sum(dim=-1) > 1e-9).nonzero().tolist() == [[1, 3, 2]]


@torch.no_grad()
def test_padding_changes_nothing(critic: MixingCritic, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Left padding as d3rlpy makes it, with rows of NaN; positions counted from the valid rows or given."""
    inputs, candidates = batch
    expected = critic(inputs, candidates)
    pad = torch.full((B, 3, 7), torch.nan, dtype=torch.float64)
    valid = torch.cat([torch.zeros(B, 3), torch.ones(B, T)], dim=1).bool()
    padded = torch.cat([pad, inputs], dim=1)
    positions = torch.arange(-3, T)[None].clamp(min=0).expand(B, -1)
    for given in (None, positions):
        torch.testing.assert_close(critic(padded, candidates, valid, given), expected, rtol=0, atol=1e-6)
    everywhere = torch.cat([torch.zeros(B, 3, N, 5, dtype=torch.float64), candidates], dim=1)
    assert torch.isfinite(critic(padded, everywhere, valid)).all()


@torch.no_grad()
def test_candidates_of_the_last_steps_only_are_those_of_all_steps(
    critic: MixingCritic, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    inputs, candidates = batch
    window = critic(inputs, candidates[:, -2:])
    torch.testing.assert_close(window, critic(inputs, candidates)[:, -2:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_order_and_absolute_step_matter(critic: MixingCritic, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Without positions, attention reads the history as a set."""
    inputs, candidates = batch
    expected = critic(inputs, candidates)[:, -1]
    swapped = inputs[:, [1, 0, *range(2, T)]]
    assert (critic(swapped, candidates)[:, -1] - expected).abs().max() > 1e-3


def test_values_span_the_declared_range() -> None:
    critic = MixingCritic(SMALL)
    assert critic.values(torch.tensor([-1e3, 0.0, 1e3])).tolist() == pytest.approx([-1.5, 0.5, 2.5])


def test_default_size_is_the_agent_s_width_with_one_layer() -> None:
    config = CriticConfig.for_agent(AgentConfig(), low=-2.0, span=3.0)
    assert sum(p.numel() for p in MixingCritic(config).parameters()) == 1_076_737
    assert (config.low, config.span) == (-2.0, 3.0)


@torch.no_grad()
def test_saved_critics_are_the_loaded_ones(tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.manual_seed(5)
    twins = [MixingCritic(SMALL), MixingCritic(SMALL)]
    save_critics(twins, tmp_path / "critic")
    state = torch.get_rng_state()
    loaded = load_critics(tmp_path / "critic")
    assert torch.equal(torch.get_rng_state(), state)
    assert len(loaded) == 2
    inputs, candidates = (part.float() for part in batch)
    for critic, again in zip(twins, loaded, strict=True):
        assert again.config == SMALL
        assert torch.equal(critic(inputs, candidates), again(inputs, candidates))


def test_changed_weights_and_configs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "critic"
    save_critics([MixingCritic(SMALL)], folder)
    config = json.loads((folder / "config.json").read_text())

    def refused(match: str, **changes: object) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(CheckpointError, match=match):
            load_critics(folder)

    refused("schema version 2", schema_version=2)
    refused("num_critics '1'", num_critics="1")
    refused("lacks tensors", num_critics=2)
    refused("has shape", d_ff=32)
    refused("span is 0", span=0.0)
    refused("unknown \\['spam'\\]", spam=1)
    (folder / "config.json").write_text(json.dumps(config))
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    weights["0.head.bias"] += 1.0
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        load_critics(folder)
    with pytest.raises(CheckpointError, match="not an agent checkpoint"):
        load_critics(tmp_path / "nothing")


def test_a_diverged_critic_and_unequal_critics_are_not_saved(tmp_path: Path) -> None:
    critic = MixingCritic(SMALL)
    with pytest.raises(ConfigurationError, match="0 critics"):
        save_critics([], tmp_path)
    with pytest.raises(ConfigurationError, match="2 configs"):
        save_critics([critic, MixingCritic(CriticConfig())], tmp_path)
    with torch.no_grad():
        critic.head.bias.fill_(np.nan)
    with pytest.raises(CheckpointError, match="diverged"):
        save_critics([critic], tmp_path)


def test_shapes_and_settings_that_cannot_work_are_refused() -> None:
    critic = MixingCritic(SMALL)
    with pytest.raises(ConfigurationError, match=r"expected \(batch, steps, 7\)"):
        critic(torch.zeros(1, 3, 6), torch.zeros(1, 3, 1, 5))
    with pytest.raises(ConfigurationError, match="the last of these steps"):
        critic(torch.zeros(1, 3, 7), torch.zeros(1, 4, 1, 5))
    with pytest.raises(ConfigurationError, match="even head width"):
        CriticConfig(d_model=6, num_heads=2)
    with pytest.raises(ConfigurationError, match="low is nan"):
        CriticConfig(low=float("nan"))
    with pytest.raises(ConfigurationError, match="d_ff is 0"):
        CriticConfig(d_ff=0)
