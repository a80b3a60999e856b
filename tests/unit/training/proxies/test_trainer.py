"""Training of stacked proxies: each is trained as if it were alone, and a restored state continues exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch

from dmagent_loader.errors import ConfigurationError, StateError
from dmagent_loader.training.proxies.model import ProxyConfig, StackedProxies
from dmagent_loader.training.proxies.trainer import ProxyTrainer, mixed_precision

CONFIG = ProxyConfig(
    vocab_size=60, width=16, layers=2, heads=2, feed_forward=24, rows_per_update=2, warmup_updates=3, averaging=0.7
)
STEPS = 4


def rows(number: int, step: int) -> torch.Tensor:
    """(4 rows, 9 tokens): each proxy has its own, with losses of quite different size."""
    generator = torch.Generator().manual_seed(100 * number + step)
    return torch.randint(0, 5 + 20 * number, (4, 9), generator=generator)


def start_of(number: int) -> dict[str, torch.Tensor]:
    """Weights to start from, other ones for each proxy."""
    return StackedProxies(1, dataclasses.replace(CONFIG, seed=10 + number)).state_dict()


def trained_alone(number: int, steps: int = STEPS) -> ProxyTrainer:
    trainer = ProxyTrainer(1, CONFIG, start=start_of(number))
    for step in range(steps):
        trainer.train(rows(number, step)[None])
    return trainer


def together(numbers: Sequence[int]) -> ProxyTrainer:
    starts = [start_of(i) for i in numbers]
    start = {name: torch.cat([weights[name] for weights in starts]) for name in starts[0]}
    return ProxyTrainer(len(numbers), CONFIG, start=start)


def assert_same_weights(one: StackedProxies, i: int, other: StackedProxies, j: int) -> None:
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(a[i], b[j], rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_training_many_at_once_equals_training_each_alone() -> None:
    """Catches every operation that mixes proxies: rows, embeddings or statistics taken over the whole stack."""
    trainer = together(range(3))
    for step in range(STEPS):
        losses = trainer.train(torch.stack([rows(i, step) for i in range(3)]))
    assert losses.max() > losses.min() + 0.1
    for i in range(3):
        alone = trained_alone(i)
        assert_same_weights(trainer.model, i, alone.model, 0)
        assert_same_weights(trainer.averaged, i, alone.averaged, 0)


def test_an_update_is_one_of_plain_adamw_on_the_mean_loss() -> None:
    """Against torch's optimiser in a loop: catches a wrong warm-up, and gradients that grow with the number."""
    trainer = together(range(2))
    plain = StackedProxies(1, CONFIG)
    plain.load_state_dict(start_of(1))
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1.0, betas=(0.9, 0.95), weight_decay=CONFIG.weight_decay)
    updates = 0
    for step in range(STEPS):
        trainer.train(torch.stack([rows(i, step) for i in range(2)]))
        for pair in torch.split(rows(1, step), CONFIG.rows_per_update):
            updates += 1
            optimizer.param_groups[0]["lr"] = CONFIG.learning_rate * min(1.0, updates / CONFIG.warmup_updates)
            logits = plain.logits(plain.hidden(pair[None, :, :-1]))[0]
            loss = torch.nn.functional.cross_entropy(logits, pair[:, 1:].reshape(-1))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
    assert_same_weights(trainer.model, 1, plain, 0)


def test_the_average_is_over_the_updates_so_far_and_then_forgets() -> None:
    """A loop over the weights after each update: catches averages per step, and a start that lingers."""
    trainer = together(range(2))
    expected = [p.detach().clone() for p in trainer.model.parameters()]
    updates = 0
    for step in range(STEPS):
        for pair in torch.split(torch.stack([rows(i, step) for i in range(2)]), CONFIG.rows_per_update, dim=1):
            trainer.train(pair)
            updates += 1
            new = max(1 - CONFIG.averaging, 1 / (updates + 1))
            expected = [
                (1 - new) * a + new * p.detach() for a, p in zip(expected, trainer.model.parameters(), strict=True)
            ]
    for mean, p, raw in zip(expected, trainer.averaged.parameters(), trainer.model.parameters(), strict=True):
        torch.testing.assert_close(p, mean, rtol=1e-4, atol=1e-6)
        assert not torch.equal(p, raw)
    assert updates == 2 * STEPS > 1 / (1 - CONFIG.averaging)


def test_without_averaging_the_weights_themselves_are_scored() -> None:
    trainer = ProxyTrainer(1, dataclasses.replace(CONFIG, averaging=0.0))
    assert trainer.averaged is trainer.model
    trainer.train(rows(0, 0)[None])
    assert not any(name.endswith(".average") for name in trainer.state())


@pytest.mark.parametrize("kept", [[0, 2], [2, 0], [1]])
def test_those_that_are_kept_go_on_as_if_they_had_been_alone(kept: list[int]) -> None:
    """Catches moments of the optimiser, or averages, that stay with the wrong proxy."""
    trainer = together(range(3))
    for step in range(2):
        trainer.train(torch.stack([rows(i, step) for i in range(3)]))
    trainer.keep(kept)
    for step in range(2, STEPS):
        trainer.train(torch.stack([rows(i, step) for i in kept]))
    assert trainer.model.num_proxies == trainer.averaged.num_proxies == len(kept)
    for position, number in enumerate(kept):
        alone = trained_alone(number)
        assert_same_weights(trainer.model, position, alone.model, 0)
        assert_same_weights(trainer.averaged, position, alone.averaged, 0)


def test_a_restored_state_continues_exactly() -> None:
    """Catches a warm-up that starts again, and moments or averages that are lost."""
    whole = trained_alone(1)
    first = trained_alone(1, steps=1)
    state = {name: tensor.clone() for name, tensor in first.state().items()}
    second = ProxyTrainer(4, CONFIG)
    second.load_state(state)
    for step in range(1, STEPS):
        second.train(rows(1, step)[None])
    for one, other in ((whole.model, second.model), (whole.averaged, second.averaged)):
        assert other.num_proxies == 1
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)


def test_states_of_another_size_or_without_averages_are_refused() -> None:
    other = ProxyTrainer(1, ProxyConfig(vocab_size=60, width=32, heads=2))
    with pytest.raises(StateError, match="another size"):
        other.load_state(trained_alone(0, steps=1).state())
    plain = ProxyTrainer(1, dataclasses.replace(CONFIG, averaging=0.0))
    with pytest.raises(StateError, match="size or averaging"):
        plain.load_state(trained_alone(0, steps=1).state())


def test_on_a_cpu_nothing_is_rounded_to_bfloat16() -> None:
    with mixed_precision(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_proxies_learn_what_they_learn_on_a_cpu() -> None:
    """In bfloat16, so only roughly the same; and a state moves between the devices."""
    cpu, gpu = together(range(3)), ProxyTrainer(3, CONFIG, start=together(range(3)).model.state_dict(), device="cuda")
    for step in range(STEPS):
        batch = torch.stack([rows(i, step) for i in range(3)])
        torch.testing.assert_close(gpu.train(batch), cpu.train(batch), rtol=0.02, atol=0.02)
    assert all(parameter.dtype == torch.float32 for parameter in gpu.model.parameters())
    back = ProxyTrainer(3, CONFIG)
    back.load_state(gpu.state())
    for a, b in zip(back.averaged.parameters(), gpu.averaged.parameters(), strict=True):
        assert torch.equal(a, b.cpu())


def test_rows_that_do_not_divide_into_updates_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="rows_per_update"):
        ProxyTrainer(1, CONFIG).train(rows(0, 0)[None, :3])
