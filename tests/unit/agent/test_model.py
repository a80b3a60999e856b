"""The agent's network and its proposals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from dmagent_loader.agent import AgentConfig, MixingAgent
from dmagent_loader.errors import ConfigurationError, DomainError, FeedbackError
from dmagent_loader.mixture.history import History, standardize
from dmagent_loader.mixture.simplex import total_variation

MakeHistory = Callable[..., History]


def random_inputs(batch: int, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixes = torch.rand(batch, steps, 52, generator=generator)
    return torch.cat([mixes / mixes.sum(-1, keepdim=True), torch.randn(batch, steps, 2, generator=generator)], dim=-1)


def test_it_has_exactly_the_documented_number_of_parameters() -> None:
    assert MixingAgent(AgentConfig()).num_parameters() == 2_125_568


def test_every_output_is_a_mix(agent: MixingAgent) -> None:
    mixes = agent(random_inputs(3, 9))
    assert mixes.shape == (3, 9, 52)
    assert (mixes >= 0).all()
    torch.testing.assert_close(mixes.sum(-1), torch.ones(3, 9))


@pytest.mark.parametrize("changed", range(12))
def test_a_prediction_does_not_depend_on_later_steps(agent: MixingAgent, changed: int) -> None:
    """Fails without the causal mask, and with one that is off by one step in either direction."""
    inputs = random_inputs(1, 12)
    other = inputs.clone()
    other[:, changed:] = random_inputs(1, 12 - changed, seed=1)
    with torch.no_grad():
        before, after = agent(inputs), agent(other)
    torch.testing.assert_close(before[:, :changed], after[:, :changed], atol=1e-6, rtol=0)
    assert ((before[:, changed] - after[:, changed]).abs().sum() > 1e-3).all()


def test_step_by_step_gives_the_same_as_all_at_once(agent: MixingAgent) -> None:
    inputs = random_inputs(2, 30)
    with torch.no_grad():
        whole = agent(inputs)
        steps = torch.stack([agent(inputs[:, : t + 1])[:, -1] for t in range(30)], dim=1)
    torch.testing.assert_close(whole, steps, atol=1e-6, rtol=0)


def test_padding_on_the_left_changes_nothing(agent: MixingAgent) -> None:
    """Fails if padding is attended to, and if positions count the padding and attention is not relative."""
    inputs = random_inputs(3, 20)
    lengths = [20, 7, 1]
    padded, mask = torch.full((3, 20, 54), float("nan")), torch.zeros(3, 20, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padded[row, 20 - length :] = inputs[row, :length]
        mask[row, 20 - length :] = True
    with torch.no_grad():
        batched = agent(padded, mask)
        for row, length in enumerate(lengths):
            alone = agent(inputs[row : row + 1, :length])[0]
            torch.testing.assert_close(batched[row, 20 - length :], alone, atol=1e-6, rtol=0)


def test_padding_gives_neither_nan_outputs_nor_nan_gradients() -> None:
    """A row that may attend to nothing is NaN after the softmax, and spoils the gradient even if nobody reads it."""
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(d_model=16, num_heads=2, d_ff=32))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 4:] = True
    mixes = agent(random_inputs(2, 6), mask)
    assert torch.isfinite(mixes).all()
    mixes[mask].square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in agent.parameters() if p.grad is not None)


def test_positions_of_a_fragment_count_from_its_absolute_step(agent: MixingAgent) -> None:
    """Rotary attention sees differences of steps: a shift changes nothing, a gap does."""
    inputs = random_inputs(1, 6)
    steps = torch.arange(6)[None]
    with torch.no_grad():
        plain, shifted = agent(inputs), agent(inputs, positions=steps + 40)
        stretched = agent(inputs, positions=steps * 9)
    torch.testing.assert_close(plain, shifted, atol=1e-5, rtol=0)
    assert (plain - stretched).abs().max() > 1e-4


def test_another_width_is_refused(agent: MixingAgent) -> None:
    with pytest.raises(ConfigurationError, match=r"shape \(1, 4, 52\); expected \(batch, steps, 54\)"):
        agent(torch.zeros(1, 4, 52))


def test_a_proposal_is_the_last_row_of_the_forward_pass(agent: MixingAgent, make_history: MakeHistory) -> None:
    """The shortcut of computing only the last row of the last block must not change it."""
    history = make_history(40)
    assert agent.config.statistics is not None
    feedback = standardize(history.feedback, agent.config.statistics, "anchored")
    inputs = torch.from_numpy(np.hstack([history.mixes, feedback])).float()[None]
    with torch.no_grad():
        expected = agent(inputs)[0, -1].double().numpy()
    proposal = agent.propose(history)
    assert proposal.dtype == np.float64
    assert abs(proposal.sum() - 1.0) < 1e-12
    np.testing.assert_allclose(proposal, expected, atol=1e-6)


def test_each_standardization_reaches_the_network(agent: MixingAgent, make_history: MakeHistory) -> None:
    history = make_history(12)
    modes = ("frozen", "running", "anchored")
    proposals = {mode: agent.propose(history, standardization=mode) for mode in modes}
    for first, second in (("frozen", "running"), ("running", "anchored"), ("anchored", "frozen")):
        assert total_variation(proposals[first], proposals[second]) > 1e-4
    np.testing.assert_array_equal(agent.propose(history), proposals["anchored"])


def test_the_prior_weight_of_the_checkpoint_is_used(agent: MixingAgent, make_history: MakeHistory) -> None:
    other = MixingAgent(dataclasses.replace(agent.config, prior_weight=0.5))
    other.load_state_dict(agent.state_dict())
    assert total_variation(agent.propose(make_history(12)), other.propose(make_history(12))) > 1e-5


def test_autocast_of_the_surrounding_training_loop_changes_nothing(
    agent: MixingAgent, make_history: MakeHistory
) -> None:
    expected = agent.propose(make_history(20))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        np.testing.assert_array_equal(agent.propose(make_history(20)), expected)


def test_a_proposal_leaves_gradients_and_random_numbers_alone(agent: MixingAgent, make_history: MakeHistory) -> None:
    before = torch.get_rng_state()
    agent.propose(make_history(5))
    assert torch.equal(before, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in agent.parameters())


def test_a_longer_history_than_trained_on_is_cut_with_a_warning(agent: MixingAgent, make_history: MakeHistory) -> None:
    """Standardised over all of it first: cutting before would move the anchor."""
    history = make_history(100)
    with pytest.warns(UserWarning, match="100 steps, but agent 'seven' was trained on at most 80"):
        proposal = agent.propose(history)
    inputs = torch.from_numpy(agent.encode(history)).float()[None, -80:]
    with torch.no_grad():
        expected = agent(inputs)[0, -1].numpy()
    np.testing.assert_allclose(proposal, expected, atol=1e-5)


def test_a_history_of_exactly_the_trained_length_does_not_warn(
    agent: MixingAgent, make_history: MakeHistory, recwarn: pytest.WarningsRecorder
) -> None:
    agent.propose(make_history(80))
    assert not recwarn.list


def test_unusable_histories_are_refused(agent: MixingAgent, make_history: MakeHistory) -> None:
    history = make_history(3)
    with pytest.raises(DomainError, match=r"52 domains \(target/Travel.*use policies.AgentPolicy"):
        agent.propose(dataclasses.replace(history, domains=history.domains[::-1]))
    three = dataclasses.replace(history, fields=("general", "math", "code"), feedback=np.zeros((3, 3)))
    with pytest.raises(ConfigurationError, match=r"3 fields \['general', 'math', 'code'\].*reads 2"):
        agent.propose(three)
    with pytest.raises(ConfigurationError, match="empty"):
        agent.propose(dataclasses.replace(history, mixes=np.zeros((0, 52)), feedback=np.zeros((0, 2))))
    with pytest.raises(FeedbackError, match="not finite"):
        agent.propose(dataclasses.replace(history, feedback=np.full((3, 2), np.nan)))


def test_an_agent_without_statistics_says_so(make_history: MakeHistory) -> None:
    with pytest.raises(ConfigurationError, match="no feedback statistics"):
        MixingAgent(AgentConfig()).propose(make_history(3))


def test_it_can_learn(make_history: MakeHistory) -> None:
    """Every weight gets a gradient, and a few steps of SFT on a fixed answer lower the loss."""
    torch.manual_seed(0)
    agent = MixingAgent(AgentConfig(d_model=32, num_heads=2, d_ff=64))
    inputs, answer = random_inputs(4, 10), torch.zeros(52)
    answer[3], answer[40] = 0.25, 0.75
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (agent(inputs) - answer).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in agent.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.01 * losses[0]
