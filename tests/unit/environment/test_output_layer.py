"""The output layer is applied to the scored positions alone where that changes nothing, and left alone elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from dmagent_loader.environment import Environment, scoring
from dmagent_loader.environment.output_layer import output_layer
from dmagent_loader.environment.scoring import Scorer, scoring_state

VOCABULARY = 257  # no other size in these models, so that logits are known by it


class Causal(nn.Module):
    """Names its output layer as models of transformers do."""

    def __init__(self, head: nn.Module | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 16)
        self.head = nn.Linear(16, VOCABULARY) if head is None else head
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask):
        steps = torch.arange(1, input_ids.shape[1] + 1)[:, None]
        return self.logits(self.embedding(input_ids).cumsum(dim=1) / steps)

    def logits(self, hidden):
        return self.head(hidden)


def environment(pairs, **settings):
    return Environment.from_pairs({"x": pairs}, lambda text: list(text.encode()), progress=False, **settings)


def takes_over(model, pairs) -> bool:
    windows = [window for listed in environment(pairs)._windows_of(model).values() for window in listed]
    with scoring_state(model):
        return Scorer(model).take_over_output_layer(windows)


def sums(model, pairs, **settings):
    return environment(pairs, **settings).log_likelihoods(model)["x"].sums


def expected_sums(model, pairs):
    """Pair by pair from the logits of all positions, without anything of the package but the tokens."""
    values = []
    for encoded in environment(pairs)._encoded:
        tokens = torch.from_numpy(encoded.tokens)[None]
        with torch.no_grad():
            output = model(input_ids=tokens[:, :-1], attention_mask=torch.ones_like(tokens[:, :-1]))
        log_probs = getattr(output, "logits", output).double().log_softmax(-1)
        picked = log_probs.gather(-1, tokens[:, 1:, None])[0, :, 0]
        values.append(float(picked[-encoded.num_answer_tokens :].sum()))
    return np.array(values)


class Logits(TorchFunctionMode):
    """Notes how many logits a model's output layer makes at a time."""

    def __init__(self, model: Causal) -> None:
        super().__init__()
        self.weights = model.head.weight.untyped_storage().data_ptr()
        self.most = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and args[1].untyped_storage().data_ptr() == self.weights:
            self.most = max(self.most, result.numel())
        return result


def test_it_is_applied_to_the_scored_positions_alone_and_gives_the_same(pairs):
    """Catches exchanged rows and columns, positions counted from the left of a padded batch, a shift by one."""
    model = Causal()

    assert takes_over(model, pairs)
    np.testing.assert_allclose(sums(model, pairs), expected_sums(model, pairs), rtol=0, atol=1e-4)


def test_logits_of_a_whole_call_are_never_in_memory(pairs, monkeypatch):
    """That is what keeps an evaluation beside a training run from running out of memory."""
    monkeypatch.setattr(scoring, "BLOCK_POSITIONS", 50)
    monkeypatch.setattr(scoring, "BLOCK_VALUES", 1000)
    settings = {"batch_size": 64, "batch_tokens": 100_000}
    taken_over, plain = Causal(), Scaled()
    with Logits(taken_over) as ours:
        found = sums(taken_over, pairs, **settings)
    with Logits(plain) as whole:
        sums(plain, pairs, **settings)

    one_of_each_row = len(pairs) * VOCABULARY  # with which the model goes on
    assert 0 < ours.most <= one_of_each_row < whole.most
    np.testing.assert_allclose(found, expected_sums(taken_over, pairs), rtol=0, atol=1e-4)


class Capped(Causal):
    def logits(self, hidden):
        return 5 * torch.tanh(self.head(hidden) / 5)


class Scaled(Causal):
    def logits(self, hidden):
        return self.head(hidden) / 8


class RowsExchanged(Causal):
    def logits(self, hidden):
        return self.head(hidden.flip(0)).flip(0)


class Flattened(Causal):
    def logits(self, hidden):
        return self.head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])


class UsedTwice(Causal):
    def logits(self, hidden):
        return self.head(hidden) + 0 * self.head(hidden / 2)


class AnotherIsUsed(Causal):
    def get_output_embeddings(self):
        return nn.Linear(16, VOCABULARY)


class NamesNothing(Causal):
    def get_output_embeddings(self):
        return None


class CannotName(Causal):
    def get_output_embeddings(self):
        raise NotImplementedError


class Adapted(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.sum(-1, keepdim=True)


def offloaded(layer: nn.Linear) -> nn.Linear:
    """With a forward of the object's own, as accelerate gives to layers whose weights lie elsewhere."""
    inner = layer.forward
    layer.forward = lambda x: 2 * inner(x)
    return layer


MORE = {
    "capped": Capped,
    "scaled": Scaled,
    "rows exchanged": RowsExchanged,
    "flattened": Flattened,
    "used twice": UsedTwice,
    "another is used": AnotherIsUsed,
    "names nothing": NamesNothing,
    "cannot name": CannotName,
    "adapted": lambda: Causal(Adapted(16, VOCABULARY)),
    "offloaded": lambda: Causal(offloaded(nn.Linear(16, VOCABULARY))),
}


@pytest.mark.parametrize("more", MORE)
def test_a_model_that_does_more_is_left_alone(pairs, more):
    """Catches a wrong guess about an unknown model, which would be wrong feedback without any message."""
    model = MORE[more]()

    assert not takes_over(model, pairs)
    np.testing.assert_allclose(sums(model, pairs), expected_sums(model, pairs), rtol=0, atol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_on_the_layer(pairs, fails):
    """A hook that stayed would cut the hidden states of the next training step."""
    model = Causal()
    called = []
    model.head.register_forward_pre_hook(lambda module, inputs: called.append(1))
    before = dict(model.head._forward_pre_hooks)
    if fails:
        model.logits = lambda hidden: model.head(hidden) if len(called) < 2 else 1 / 0
        with pytest.raises(ZeroDivisionError):
            sums(model, pairs)
    else:
        sums(model, pairs)

    assert dict(model.head._forward_pre_hooks) == before
    assert called, "hooks of others are still called"


AFTER = {
    "cap": lambda logits: 30 * torch.tanh(logits / 30),
    "scale": lambda logits: logits * 1.003,
    "bias": lambda logits: logits + 0.004,
    "bias of one token": lambda logits: logits + (torch.arange(VOCABULARY) == 7) * 0.004,
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("size", [0.01, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_function_of_the_logits_is_never_left_out(pairs, after, size, dtype):
    """A cap of 30 was left out as long as logits were small: feedback jumped when they grew, in the middle of a run."""
    model = Causal()
    model.logits = lambda hidden: AFTER[after](model.head(hidden))
    with torch.no_grad():
        model.head.weight.mul_(size)
    model.to(dtype)

    assert not takes_over(model, pairs)
    np.testing.assert_allclose(sums(model, pairs), expected_sums(model, pairs), rtol=0, atol=1e-3)


@pytest.mark.parametrize("after", ["nothing", *AFTER])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_way_of_scoring_does_not_depend_on_the_size_of_the_logits(pairs, after, dtype):
    """Logits grow in training; feedback jumped where a cap was left out before."""
    ways = []
    for size in (0.01, 1.0, 10.0):
        model = Causal()
        if after != "nothing":
            model.logits = lambda hidden, head=model.head: AFTER[after](head(hidden))
        with torch.no_grad():
            model.head.weight.mul_(size)
        ways.append(takes_over(model.to(dtype), pairs))
    assert ways == [after == "nothing"] * 3


def test_a_hook_of_others_that_changes_the_logits_is_obeyed(pairs):
    model = Causal()
    model.head.weight.data.mul_(0.01)
    model.head.register_forward_hook(lambda module, inputs, output: AFTER["cap"](output))

    assert not takes_over(model.to(torch.bfloat16), pairs)


@pytest.mark.slow
def test_compiled_models_are_scored_uncompiled(pairs):
    """A model compiled in place was compiled anew for the shape of each call: minutes. Slow: torch.compile imports."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    class Outer(Causal):
        def __init__(self, inner, head):
            super().__init__()
            self.inner, self.head = inner, head

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask)

    in_place, inside, method = Causal(), Causal(), Causal()
    in_place.compile(backend=backend)
    method.forward = torch.compile(method.forward, backend=backend)
    outer = Outer(torch.compile(inside, backend=backend), inside.head)

    for model in (in_place, method, outer, Outer(in_place, in_place.head)):
        torch.compiler.reset()  # or code compiled for one model would serve the next
        compiled.clear()
        training_batch = torch.ones(2, 9, dtype=torch.int64), None
        model(*training_batch)
        before = len(compiled)
        assert before, "the model is compiled for training"

        assert takes_over(model, pairs)
        np.testing.assert_allclose(sums(model, pairs), expected_sums(Causal(), pairs), rtol=0, atol=1e-4)
        model(*training_batch)
        assert len(compiled) == before, "neither scoring nor the next training step compiled anything"


@pytest.mark.slow
def test_compiled_models_are_left_alone_where_they_cannot_be_run_uncompiled(pairs, monkeypatch):
    """Compiled code keeps the hooks that it was compiled with. Slow: torch.compile imports for seconds."""
    monkeypatch.setattr("dmagent_loader.environment.output_layer.CAN_FORCE_EAGER", False)
    monkeypatch.setattr("dmagent_loader.environment.scoring.CAN_FORCE_EAGER", False)
    in_place, inside, method = Causal(), Causal(), Causal()
    in_place.compile(backend="eager")
    method.forward = torch.compile(method.forward, backend="eager")

    class Outer(Causal):
        def __init__(self):
            super().__init__()
            self.inner = torch.compile(inside, backend="eager")

        def get_output_embeddings(self):
            return inside.head

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids, attention_mask)

    for model in (in_place, method, Outer()):
        assert output_layer(model) is None
        np.testing.assert_allclose(sums(model, pairs), expected_sums(Causal(), pairs), rtol=0, atol=1e-4)


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2}
MODELS = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SIZES, "max_position_embeddings": 256}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 256}),
    "Gemma 2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**SIZES, "final_logit_softcapping": 2.0},
    ),
    "Cohere": ("CohereForCausalLM", "CohereConfig", {**SIZES, "logit_scale": 0.1}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.5)])
def test_models_of_transformers_give_what_their_logits_say(pairs, name, dtype, tolerance):
    """Gemma 2 caps its logits and Cohere scales them: those are left alone, in half precision too."""
    transformers = pytest.importorskip("transformers")
    model_class, config_class, settings = MODELS[name]
    config = getattr(transformers, config_class)(
        vocab_size=VOCABULARY, initializer_range=0.5, pad_token_id=0, bos_token_id=1, eos_token_id=1, **settings
    )
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).to(dtype).eval()

    assert takes_over(model, pairs) is (name in ("Llama", "GPT-2"))
    np.testing.assert_allclose(sums(model, pairs), expected_sums(model, pairs), rtol=tolerance / 50, atol=tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_diverged_is_scored_as_any_other(pairs, value):
    """Its feedback then says what happened; comparing its logits must not fail with words of torch."""
    model = Causal()
    with torch.no_grad():
        model.head.weight[5] = value
    assert not takes_over(model, pairs)
