"""`Environment.influence`: the right sign and size, honest errors, and nothing left behind."""

from __future__ import annotations

import json
import random
import re
import weakref
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dmagent_loader.environment import Environment
from dmagent_loader.errors import ConfigurationError, InfluenceError
from dmagent_loader.mixture.influence import Influence

V = 256


def tokens(text):
    return list(text.encode())


class Bigrams(nn.Module):
    """Logits of the next byte, from this one alone: all gradients are known in closed form."""

    def __init__(self, table=None):
        super().__init__()
        self.table = nn.Embedding(V, V, _weight=torch.zeros(V, V) if table is None else table)

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids)


def mean_gradient(pairs, table):
    """Gradient of the mean log-probability of (this, next) pairs, by hand: one-hot less softmax, in row `this`."""
    gradient = np.zeros((V, V))
    for this, following in pairs:
        gradient[this] -= np.exp(table[this]) / np.exp(table[this]).sum()
        gradient[this, following] += 1
    return gradient / len(pairs)


def bigrams(text):
    return list(pairwise(tokens(text)))


def unit_adam(model):
    """AdamW whose second moments are 1 everywhere, so that the preconditioner is the identity."""
    optimizer = torch.optim.AdamW(model.parameters(), eps=0.0, betas=(0.9, 0.5))
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(1000.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.ones_like(parameter),
        }
    return optimizer


QUESTIONS = {"sums": [("1+1=", "2"), ("2+2=", "4")], "talk": [("good", " day"), ("how are", " you"), ("why", " not")]}
ROWS = {
    "source/talk": ["good day to you", "how are you now"],
    "target/sums": ["1+1=2;2+2=4;3+3=6", "2+2=4;4+4=8;1+1=2"],
}


def environment(**settings):
    return Environment.from_pairs(QUESTIONS, tokens, progress=False, separator="", **settings)


def rows():
    return {domain: [tokens(row) for row in listed] for domain, listed in ROWS.items()}


@pytest.mark.parametrize(("way", "tolerance"), [("gradient", 1e-5), ("ghost", 1e-5), ("reverse", 2e-3)])
def test_scores_are_the_inner_products_that_a_linear_model_has_in_closed_form(way, tolerance):
    torch.manual_seed(0)
    model = Bigrams(torch.randn(V, V))
    table = model.table.weight.detach().double().numpy()
    found = environment().influence(model, rows(), optimizer=unit_adam(model), way=way, damping=0.0)
    for field, pairs in QUESTIONS.items():
        asked = np.mean(
            [mean_gradient(bigrams(question + answer)[-len(answer) :], table) for question, answer in pairs], axis=0
        )
        for domain, listed in ROWS.items():
            update = np.mean([mean_gradient(bigrams(row), table) for row in listed], axis=0)
            assert found[field][domain].value == pytest.approx((asked * update).sum(), abs=tolerance)


@pytest.mark.parametrize("way", ["gradient", "ghost", "reverse"])
def test_a_positive_score_means_that_training_on_the_domain_raises_the_field(way):
    """A swapped sign, or fields and domains exchanged, would pass most other tests."""
    torch.manual_seed(0)
    model = Bigrams(0.1 * torch.randn(V, V))
    found = environment().influence(model, rows(), optimizer=unit_adam(model), way=way)
    assert found["sums"]["target/sums"].value > 0 > found["sums"]["source/talk"].value - 0.01
    assert found["talk"]["source/talk"].value > found["talk"]["target/sums"].value
    before = environment().evaluate(model)
    rate = 0.05
    for domain, listed in rows().items():
        trained = Bigrams(model.table.weight.detach().clone())
        loss = sum(
            nn.functional.cross_entropy(trained(torch.tensor([row[:-1]]), None)[0], torch.tensor(row[1:]))
            for row in listed
        ) / len(listed)
        loss.backward()
        with torch.no_grad():
            trained.table.weight -= rate * trained.table.weight.grad
        after = environment().evaluate(trained)
        for field in QUESTIONS:
            # The default damping of 0.1 divides all scores by 1.1 here.
            assert after[field] - before[field] == pytest.approx(rate * 1.1 * found[field][domain].value, abs=2e-4)


def test_the_standard_error_covers_what_other_rows_and_questions_would_give():
    """Too small an error would let noise decide; it may be too large, by design, but not by much."""
    rng = np.random.default_rng(0)

    def text(length):
        return bytes(rng.integers(97, 123, length).tolist()).decode()

    model = Bigrams()
    values, errors = [], []
    for _ in range(30):
        asked = Environment.from_pairs({"a": [(text(6), text(4)) for _ in range(24)]}, tokens, progress=False)
        drawn = {domain: [tokens(text(24)) for _ in range(16)] for domain in ("x", "y", "z")}
        found = asked.influence(model, drawn, optimizer=unit_adam(model))
        values.append(found.values()[0])
        errors.append(found.errors()[0])
    spread = np.std(values, axis=0, ddof=1).mean()
    assert 0.7 * spread < np.mean(errors) < 1.8 * spread


def llama(**settings):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        attention_dropout=0.1,
        **settings,
    )
    return LlamaForCausalLM(config).train()


def plain():
    return llama()


def tied():
    return llama(tie_word_embeddings=True)


def half():
    return llama().to(torch.bfloat16)


def checkpointed():
    model = llama()
    model.gradient_checkpointing_enable()
    return model


class LowRank(nn.Module):
    """A frozen layer with a trainable low-rank part beside it, as adapters are."""

    def __init__(self, frozen):
        super().__init__()
        self.frozen = frozen
        self.down = nn.Linear(frozen.in_features, 2, bias=False)
        self.up = nn.Linear(2, frozen.out_features, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(self.dropout(x)))


def adapted():
    model = llama()
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj = LowRank(layer.self_attn.q_proj)
    return model


MODELS = [plain, tied, half, checkpointed, adapted]


def snapshot(model, optimizer):
    """All that training goes on from, as bytes or objects that compare bit for bit."""
    state = [(name, tensor.detach().clone()) for name, tensor in model.state_dict().items()]
    moments = [
        (name, value.clone() if isinstance(value, torch.Tensor) else value)
        for own in optimizer.state.values()
        for name, value in own.items()
    ]
    grads = [(id(p.grad), None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    return {
        "tensors": state + moments,
        "grads": grads,
        "other": [modes, model.config.use_cache, random.getstate(), torch.is_grad_enabled()],
        "random": [torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].astype(np.int64))],  # noqa: NPY002
    }


def assert_same(before, after):
    for (name, one), (_, other) in zip(before["tensors"], after["tensors"], strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other)), name
    for (which, one), (same, other) in zip(before["grads"], after["grads"], strict=True):
        assert which == same
        assert (one is None and other is None) or torch.equal(one, other)
    assert before["other"] == after["other"]
    for one, other in zip(before["random"], after["random"], strict=True):
        assert torch.equal(one, other)


def trained(build):
    """A model with two optimizer steps behind it and gradients of a third in place, and its optimizer."""
    model = build()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        batch = torch.randint(0, V, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        if step < 2:
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("way", ["gradient", "ghost", "reverse"])
@pytest.mark.parametrize("knows_optimizer", [True, False])
def test_nothing_is_left_behind(build, way, knows_optimizer):
    """Parameters put back by subtraction, or a gradient that is left, would train on something else without a word."""
    model, optimizer = trained(build)
    before = snapshot(model, optimizer)
    found = environment().influence(model, rows(), optimizer=optimizer if knows_optimizer else None, way=way)
    assert_same(before, snapshot(model, optimizer))
    assert np.isfinite(found.values()).all()
    assert (found.errors() > 0).all()


@pytest.mark.parametrize("way", ["gradient", "ghost", "reverse"])
def test_nothing_is_left_behind_by_a_model_that_fails_half_way(way):
    model, optimizer = trained(plain)
    calls = []

    def fail(module, inputs):
        calls.append(1)
        if len(calls) == 7:  # the reverse way has moved the parameters by then
            raise RuntimeError("a broken layer")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    before = snapshot(model, optimizer)
    with pytest.raises(RuntimeError, match="a broken layer"):
        environment().influence(model, rows(), optimizer=optimizer, way=way)
    handle.remove()
    assert_same(before, snapshot(model, optimizer))


def test_gradient_and_reverse_agree_on_a_transformer():
    """Two programs for one number: forward differences and backward products."""
    model, optimizer = trained(plain)
    one, other = (
        environment().influence(model.double(), rows(), optimizer=optimizer, way=way, step=1e-5)
        for way in ("gradient", "reverse")
    )
    assert np.corrcoef(one.values().ravel(), other.values().ravel())[0, 1] > 0.99
    np.testing.assert_allclose(one.values(), other.values(), rtol=0.05, atol=0.02 * np.abs(one.values()).max())


def reentrant():
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    return model


def gpt2():
    """Convolutions for matrices, and position embeddings that are computed once for all rows."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ).train()


@pytest.mark.parametrize("build", [*MODELS, reentrant, gpt2])
def test_the_ghost_method_gives_the_numbers_of_single_gradients(build):
    """Values and errors: the gradient method with one group for each row computes the same observations."""
    model, optimizer = trained(build)
    one, other = (environment().influence(model, rows(), optimizer=optimizer, way=way) for way in ("gradient", "ghost"))
    assert (other.way, other.notes) == ("ghost", ())
    tolerance = 5e-3 if build is half else 1e-4
    np.testing.assert_allclose(other.values(), one.values(), rtol=0, atol=tolerance * np.abs(one.values()).max())
    np.testing.assert_allclose(other.errors(), one.errors(), rtol=tolerance)


def test_the_ghost_method_gives_the_numbers_of_single_gradients_under_autocast():
    model, optimizer = trained(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one, other = (
            environment().influence(model, rows(), optimizer=optimizer, way=way) for way in ("gradient", "ghost")
        )
    assert other.way == "ghost"
    np.testing.assert_allclose(other.values(), one.values(), rtol=0, atol=5e-3 * np.abs(one.values()).max())


class Odd(nn.Module):
    """A model whose parameters do not all act through layers that keep the rows apart."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.embedding, self.middle, self.head = kind, nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, V)
        if kind == "own parameter":
            self.shift = nn.Parameter(torch.randn(8))
        if kind == "scaled gradient":
            self.embedding.scale_grad_by_freq = True

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids).cumsum(dim=1)
        if self.kind == "own parameter":
            x = x + self.shift
        if self.kind == "no layer":
            x = torch.tanh(nn.functional.linear(x, self.middle.weight, self.middle.bias))
        elif self.kind == "also without its layer":
            x = torch.tanh(self.middle(x) + x @ self.middle.weight)
        elif self.kind == "positions first":
            x = torch.tanh(self.middle(x.transpose(0, 1))).transpose(0, 1)
        elif self.kind == "one list":
            x = torch.tanh(self.middle(x.flatten(0, 1))).view_as(x)
        elif self.kind == "mirrored rows":
            x = torch.tanh(self.middle(x.flip(0))).flip(0)
        elif self.kind == "in place":
            x = self.middle(x).mul_(1.5)
        else:
            x = torch.tanh(self.middle(x))
        return self.head(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("own parameter", "layer '' .Odd. has parameters of its own beside sublayers"),
        ("no layer", "'middle.weight' has a gradient, but the layer that holds it is not called"),
        ("also without its layer", "gradient of 'middle.weight' does not follow"),
        ("positions first", "layer 'middle' .Linear. maps"),
        ("one list", "layer 'middle' .Linear. maps"),
        ("mirrored rows", "gradient of 'middle.weight' does not follow"),
        ("in place", "fails with access to its layers"),
        ("scaled gradient", "gradient of 'embedding.weight' does not follow"),
    ],
)
def test_a_model_that_the_ghost_method_cannot_read_is_measured_by_gradients_and_the_reason_is_logged(
    kind, reason, caplog
):
    """Its parameters would be left out, or count for another row, without a word."""
    model = Odd(kind)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = environment().influence(model, rows(), way="ghost")
    assert found.way == "gradient"
    assert re.search(reason, found.notes[0])
    assert re.search(reason, caplog.text)
    expected = environment().influence(model, rows(), way="gradient")
    np.testing.assert_array_equal(found.values(), expected.values())
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_parameters_stay_frozen_and_are_left_out_by_the_ghost_method():
    model = Odd("plain")
    model.middle.weight.requires_grad_(False)
    model.embedding.requires_grad_(False)
    one, other = (environment().influence(model, rows(), way=way) for way in ("gradient", "ghost"))
    assert other.way == "ghost"
    np.testing.assert_allclose(other.values(), one.values(), rtol=1e-4, atol=1e-6)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["embedding.weight", "middle.weight"]


def test_checkpointing_of_activations_changes_nothing_but_memory():
    plainly = environment().influence(plain(), rows())
    saving = environment().influence(checkpointed(), rows())
    np.testing.assert_allclose(plainly.values(), saving.values(), rtol=1e-4, atol=1e-6)


class Checkpointed(nn.Module):
    """Notes how many inputs of its middle layer are in memory when the forward pass has left it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.middle = nn.Embedding(V, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head, self.inputs, self.alive = nn.Linear(8, V), [], []

    def block(self, x):
        x = torch.tanh(self.first(x))
        self.inputs.append(weakref.ref(x))
        return torch.tanh(self.middle(x))

    def forward(self, input_ids, attention_mask):
        x = checkpoint(self.block, self.embedding(input_ids), use_reentrant=False)
        self.alive.append(self.inputs[-1]() is not None)
        return self.head(x)


def test_the_ghost_method_keeps_no_activation_that_checkpointing_frees():
    model = Checkpointed()
    assert environment().influence(model, rows(), way="ghost").way == "ghost"
    assert not any(model.alive)


class Narrow(nn.Module):
    """A model that runs out of memory in calls of more tokens than it has room for."""

    def __init__(self, room, room_with_gradients):
        super().__init__()
        self.inner, self.room, self.room_with_gradients = Bigrams(), room, room_with_gradients

    def forward(self, input_ids, attention_mask):
        room = self.room_with_gradients if torch.is_grad_enabled() else self.room
        if input_ids.numel() > room:
            raise torch.cuda.OutOfMemoryError(f"{input_ids.numel()} tokens")
        return self.inner(input_ids, attention_mask)


@pytest.mark.parametrize("way", ["gradient", "ghost"])
def test_lack_of_memory_is_met_by_smaller_calls_and_both_are_reported(way, caplog):
    # Two rows of a group in one call.
    wide = {domain: [*listed, *(row[::-1] for row in listed)] for domain, listed in rows().items()}
    found = environment().influence(Narrow(1000, 30), wide, row_groups=2, way=way)
    assert found.way == way
    assert "short of memory" in found.notes[0]
    assert "short of memory" in caplog.text
    expected = environment().influence(Bigrams(), wide, row_groups=2)
    np.testing.assert_allclose(found.values(), expected.values(), rtol=1e-5)


@pytest.mark.parametrize("way", ["gradient", "ghost", "reverse"])
def test_copies_of_a_row_are_no_evidence(way, caplog):
    """Copies agree with each other, so the error of boilerplate was that of the questions alone."""
    once = environment().influence(Bigrams(), rows(), way=way)
    copied = {**rows(), "source/talk": [*rows()["source/talk"], *rows()["source/talk"][:1] * 30]}
    found = environment().influence(Bigrams(), copied, way=way)
    assert found.scores == once.scores
    assert found.rows == {"source/talk": 2, "target/sums": 2}
    assert "'source/talk' (2 of 32 differ)" in caplog.text
    boilerplate = {**rows(), "source/talk": rows()["source/talk"][:1] * 32}
    alone = environment().influence(Bigrams(), boilerplate, way=way)
    assert (alone.rows["source/talk"], alone.copies["source/talk"]) == (1, 31)
    assert alone.originals("source/talk") == 1 / 32
    assert alone.originals("target/sums") == 1
    assert alone.averaged([once]).originals("source/talk") == 3 / 34
    assert Influence.from_json(json.loads(json.dumps(alone.to_json()))) == alone
    with pytest.raises(InfluenceError, match="copies of one row"):
        environment().influence(Bigrams(), {domain: listed[:1] * 2 for domain, listed in rows().items()}, way=way)


def test_lack_of_memory_for_the_least_ends_in_an_error_with_a_way_out():
    model = Narrow(3, 3)
    model.inner.table.weight.grad = torch.ones(V, V)
    with pytest.raises(InfluenceError, match="question-topics"):
        environment().influence(model, rows())
    assert torch.equal(model.inner.table.weight.grad, torch.ones(V, V))


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused():
    model = Bigrams()
    model.table.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(InfluenceError, match="would train the model"):
        environment().influence(model, rows())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda given: {}, "must map each domain"),
        (lambda given: {**given, "target/none": []}, "'target/none' has the rows"),
        (lambda given: {**given, "target/short": [[5]]}, "no token to predict"),
        (lambda given: {**given, "target/text": ["words"]}, "flat list of token ids"),
        (lambda given: {**given, "target/floats": [[0.5, 1.5]]}, "flat list of token ids"),
        (lambda given: {**given, "target/raw": [{"txt": "words"}]}, "no 'input_ids'"),
        (lambda given: {domain: listed[:1] for domain, listed in given.items()}, "more than one row"),
    ],
)
def test_rows_that_cannot_be_read_are_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        environment().influence(Bigrams(), change(rows()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"way": "sideways"}, "unknown way"),
        ({"step": 0.0}, "step is 0.0"),
        ({"damping": -1}, "damping is -1"),
        ({"question_groups": 0}, "question_groups is 0"),
        ({"rows": 3}, "no settings"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        environment().influence(Bigrams(), rows(), **settings)


def test_a_model_that_nothing_can_move_is_refused():
    with pytest.raises(ConfigurationError, match="no trainable parameter"):
        environment().influence(Bigrams().requires_grad_(False), rows())
    with pytest.raises(ConfigurationError, match="has no parameters"):
        environment().influence(lambda input_ids, attention_mask: torch.zeros(*input_ids.shape, V), rows())


def test_padding_and_ignored_labels_of_a_row_do_not_count():
    plainly = [1, 2, 3, 4]
    padded = {
        "input_ids": torch.tensor([9, *plainly, 0, 0]),
        "attention_mask": torch.tensor([1, 1, 1, 1, 1, 0, 0]),
        "labels": torch.tensor([-100, -100, 2, 3, 4, -100, -100]),
    }
    given = {"a": [padded, padded], "b": [[5, 6], [6, 7]]}
    other = {"a": [plainly, plainly], "b": [[5, 6], [6, 7]]}
    model = Bigrams()
    optimizer = unit_adam(model)
    one, two = (environment().influence(model, rows_, optimizer=optimizer) for rows_ in (given, other))
    np.testing.assert_allclose(one.values(), two.values(), rtol=1e-6)


def test_a_result_survives_json():
    found = environment().influence(Bigrams(), rows())
    assert Influence.from_json(found.to_json()) == found


@pytest.mark.parametrize("way", ["gradient", "ghost", "reverse"])
def test_a_model_that_has_diverged_is_an_error_in_every_way(way):
    """The reverse method could take a step of unknown length for none, and report no influence."""
    table = torch.zeros(V, V)
    table[tokens("=")[0], 0] = float("nan")
    with pytest.raises(InfluenceError, match="not finite"):
        environment().influence(Bigrams(table), rows(), way=way)


class TwoLayers(nn.Module):
    """Has a linear layer, whose weights autocast converts and keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, 32), nn.Linear(32, V)

    def forward(self, input_ids, attention_mask):
        return self.head(self.embedding(input_ids))


def test_cached_casts_of_autocast_do_not_hide_the_steps_of_the_reverse_method():
    model = TwoLayers()
    plain = environment().influence(model, rows(), way="reverse", step=3e-3).values()
    with torch.autocast("cpu", dtype=torch.float16):
        mixed = environment().influence(model, rows(), way="reverse", step=3e-3).values()
        assert torch.is_autocast_cache_enabled()
    np.testing.assert_allclose(mixed, plain, rtol=0, atol=0.1 * np.abs(plain).max())


def test_copies_of_a_question_do_not_make_the_errors_smaller():
    """Groups that share a question agree for no reason; each copy still counts in the feedback."""
    rows = {name: [tokens(row) for row in listed] for name, listed in ROWS.items()}
    copied = {name: [pair for pair in listed for _ in range(4)] for name, listed in QUESTIONS.items()}
    once, often = (
        Environment.from_pairs(pairs, tokens, progress=False).influence(Bigrams(), rows, question_groups=2)
        for pairs in (QUESTIONS, copied)
    )
    np.testing.assert_allclose(often.values(), once.values(), rtol=1e-5)
    np.testing.assert_allclose(often.errors(), once.errors(), rtol=1e-5)
    np.testing.assert_allclose(often.contrasts()[1], once.contrasts()[1], rtol=1e-5)


def test_a_single_question_is_told_because_errors_then_leave_out_the_choice_of_questions(caplog):
    caplog.set_level("INFO")
    rows = {name: [tokens(row) for row in listed] for name, listed in ROWS.items()}
    for copies in (1, 5):
        caplog.clear()
        pairs = {**QUESTIONS, "sums": QUESTIONS["sums"][:1] * copies}
        found = Environment.from_pairs(pairs, tokens, progress=False).influence(Bigrams(), rows)
        assert not found.by_questions
        assert "'sums' has a single question" in caplog.text
