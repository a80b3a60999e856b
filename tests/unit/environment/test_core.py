"""Feedback: its value, and what it must not depend on."""

from __future__ import annotations

import io
import logging
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmagent_loader.environment import Environment, EnvironmentSettings
from dmagent_loader.errors import ConfigurationError, EnvironmentDataError, FeedbackError

LETTERS = "abc "
BIGRAM = torch.tensor(
    [  # P(next | a), P(next | b), P(next | c), P(next | space)
        [0.1, 0.5, 0.3, 0.1],
        [0.2, 0.2, 0.2, 0.4],
        [0.7, 0.1, 0.1, 0.1],
        [0.25, 0.25, 0.25, 0.25],
    ]
)


def to_letters(text: str) -> list[int]:
    return [LETTERS.index(letter) for letter in text]


def to_bytes(text: str) -> list[int]:
    return list(text.encode())


def bigram_model(input_ids, attention_mask):
    return BIGRAM[input_ids].log()


def quiet(pairs, tokenizer=to_bytes, **settings):
    return Environment.from_pairs(pairs, tokenizer, progress=False, **settings)


def test_feedback_of_a_bigram_model_is_the_hand_computed_mean_of_means():
    """Catches: one mean over all tokens, the question scored too, the answer's first token left out."""
    environment = quiet({"x": [("a", "b"), ("b", "aca")], "y": [("c", "a")]}, to_letters, separator="")

    feedback = environment.evaluate(bigram_model)

    first = math.log(0.5)  # a -> b
    second = (math.log(0.2) + math.log(0.3) + math.log(0.7)) / 3  # b -> a, a -> c, c -> a
    assert feedback == pytest.approx({"x": (first + second) / 2, "y": math.log(0.7)}, abs=1e-6)


def test_separator_is_scored_with_the_answer():
    environment = quiet({"x": [("a", "b")]}, to_letters)

    assert environment.evaluate(bigram_model)["x"] == pytest.approx((math.log(0.1) + math.log(0.25)) / 2, abs=1e-6)


def test_pair_score_covers_every_token_but_the_first():
    environment = quiet({"x": [("ab", "c")]}, to_letters, separator="", score="pair")

    assert environment.evaluate(bigram_model)["x"] == pytest.approx((math.log(0.5) + math.log(0.2)) / 2, abs=1e-6)


def test_fields_keep_their_order_and_their_own_questions():
    environment = quiet({"z": [("a", "b")] * 3, "a": [("a", "b")]})

    assert environment.fields == ("z", "a")
    assert environment.num_questions == {"z": 3, "a": 1}


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 7}, {"batch_tokens": 1}, {"batch_tokens": 150}])
def test_feedback_does_not_depend_on_batches(model, pairs, settings):
    """Catches: padding that reaches the score, results given back in sorted instead of the given order."""
    reference = quiet({"x": pairs}).log_likelihoods(model)["x"]

    batched = quiet({"x": pairs}, **settings).log_likelihoods(model)["x"]

    np.testing.assert_allclose(batched.sums, reference.sums, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(batched.num_tokens, reference.num_tokens)


def test_batches_keep_to_the_token_budget(model, pairs):
    environment = quiet({"x": pairs}, batch_tokens=300, batch_size=5)

    environment.evaluate(model)

    assert all(rows <= 5 and (rows * width <= 300 or rows == 1) for rows, width in model.calls)
    assert sum(rows for rows, _ in model.calls) == len(pairs)


def test_calls_on_a_cpu_are_small_unless_told_otherwise(model, pairs):
    """More tokens than its caches hold make a CPU slower, not faster."""
    quiet({"x": pairs * 2}).evaluate(model)

    assert max(rows * width for rows, width in model.calls) <= 1024


def test_order_of_the_questions_does_not_change_the_feedback(model, pairs):
    forwards, backwards = quiet({"x": pairs}), quiet({"x": pairs[::-1]})

    assert forwards.evaluate(model)["x"] == pytest.approx(backwards.evaluate(model)["x"], abs=1e-6)


def test_object_with_logits_is_scored_like_the_logits(model, pairs):
    environment = quiet({"x": pairs})

    def wrapped(input_ids, attention_mask):
        return SimpleNamespace(logits=model(input_ids, attention_mask))

    model.eval()
    assert environment.evaluate(wrapped) == environment.evaluate(model)


@pytest.mark.parametrize("returned", ["last positions only", "virtual tokens in front"])
def test_logits_are_counted_from_the_right(model, pairs, returned):
    """Models may return only the positions asked for, or more than were given (prompt tuning)."""
    environment = quiet({"x": pairs})
    expected = environment.evaluate(model)

    def last_only(input_ids, attention_mask, logits_to_keep):
        return model(input_ids, attention_mask)[:, -logits_to_keep:]

    def with_virtual_tokens(input_ids, attention_mask):
        return torch.nn.functional.pad(model(input_ids, attention_mask), (0, 0, 4, 0))

    model.eval()
    assert environment.evaluate(last_only if returned == "last positions only" else with_virtual_tokens) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_float32(model, pairs, dtype):
    """Catches a softmax in half precision, which loses two digits on top of what the logits have lost."""
    environment = quiet({"x": pairs})
    model.eval()

    def half(input_ids, attention_mask):
        return model(input_ids, attention_mask).to(dtype)

    def half_then_full(input_ids, attention_mask):
        return half(input_ids, attention_mask).float()

    assert environment.evaluate(half)["x"] == pytest.approx(environment.evaluate(half_then_full)["x"], abs=1e-6)


def test_long_context_is_cut_from_the_left_and_reported(model, caplog):
    cut, short = (
        quiet({"x": [("x" * 50 + "1234", "5678")]}, separator="", max_length=6),
        quiet({"x": [("234", "5678")]}, separator=""),
    )

    with caplog.at_level(logging.WARNING):
        assert cut.evaluate(model) == pytest.approx(short.evaluate(model), abs=1e-6)
    assert "1 of 1 questions are longer than max_length=6" in caplog.text


def test_of_an_answer_longer_than_the_model_the_last_tokens_are_scored(model):
    long, short = (
        quiet({"x": [("q", "0123456789")]}, separator="", max_length=4),
        quiet({"x": [("5", "6789")]}, separator=""),
    )

    assert long.evaluate(model) == pytest.approx(short.evaluate(model), abs=1e-6)
    assert long.log_likelihoods(model)["x"].num_tokens.tolist() == [4]


def test_length_comes_from_the_model_then_the_tokenizer(model):
    class ByteTokenizer:
        model_max_length = 9

        def __call__(self, text):
            return {"input_ids": to_bytes(text)}

    environment = quiet({"x": [("x" * 40, "yes")]}, ByteTokenizer())
    environment.evaluate(model)
    model.config = SimpleNamespace(max_position_embeddings=7)
    environment.evaluate(model)

    assert [width for _, width in model.calls] == [9, 7]


def test_max_questions_are_spread_over_the_file():
    pairs = [(str(i), "a") for i in range(100)]

    assert [q.question for q in quiet({"x": pairs}, max_questions=4).questions["x"]] == ["0", "25", "50", "75"]
    assert quiet({"x": pairs}, max_questions=1000).num_questions == {"x": 100}


def test_feedback_that_is_not_finite_is_an_error_with_field_and_count(model, pairs):
    def diverged(input_ids, attention_mask):
        logits = model(input_ids, attention_mask)
        return torch.where((input_ids[:, :1] == ord("!"))[..., None], torch.nan, logits)

    environment = quiet({"fine": pairs, "broken": [("? a", "b"), ("! a", "b"), ("! c", "d")]})

    with pytest.raises(FeedbackError, match=r"2 of 3 questions of field 'broken' \(first: pair 1 of field 'broken'\)"):
        environment.evaluate(diverged)
    assert np.isnan(environment.log_likelihoods(diverged)["broken"].sums).tolist() == [False, True, True]


def test_token_of_probability_zero_is_an_error():
    """-inf is not NaN, and would be as fatal in the mean."""

    def never(input_ids, attention_mask):
        return torch.full((*input_ids.shape, 256), -torch.inf).index_fill(2, torch.tensor([0]), 0.0)

    with pytest.raises(FeedbackError, match="not finite for 1 of 1"):
        quiet({"x": [("a", "b")]}).evaluate(never)


def test_tokenizer_of_another_model_is_refused(model):
    model.config = SimpleNamespace(vocab_size=100)

    with pytest.raises(ConfigurationError, match="contain token id 121, but the model's vocabulary is 100"):
        quiet({"x": [("x", "y")]}).evaluate(model)


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (lambda ids: "text", "returned a str"),
        (lambda ids: torch.zeros(ids.shape), r"returned a tensor of shape \(1, 3\)"),
        (lambda ids: torch.zeros(1, 1, 256), r"returned a tensor of shape \(1, 1, 256\)"),
    ],
)
def test_model_without_logits_is_refused(output, shown):
    environment = quiet({"x": [("aa", "bb")]}, separator="")

    with pytest.raises(ConfigurationError, match=shown):
        environment.evaluate(lambda input_ids, attention_mask: output(input_ids))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"score": "question"}, "unknown score 'question'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_questions": 0}, "max_questions is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_tokens": -1}, "batch_tokens is -1"),
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"cloze": "yes"}, "cloze is 'yes'"),
        ({"clozed": True}, r"no settings \['clozed'\]"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigurationError, match=message):
        EnvironmentSettings.of(settings)


def test_the_name_of_a_tokenizer_is_not_taken_for_one():
    with pytest.raises(ConfigurationError, match="pass the tokenizer itself"):
        Environment.from_pairs({"x": [("a", "b")]}, "gpt2")


def test_rank_without_world_size_is_refused(model):
    with pytest.raises(ConfigurationError, match="give both or neither"):
        quiet({"x": [("a", "b")]}).evaluate(model, rank=0)


@pytest.mark.parametrize(
    ("fields", "message"), [({}, "no field"), ({"": [("a", "b")]}, "cannot name"), ({"x": []}, "'x'")]
)
def test_environment_without_questions_is_refused(fields, message):
    with pytest.raises(EnvironmentDataError, match=message):
        quiet(fields)


def test_fingerprint_follows_everything_that_changes_feedback_and_nothing_else():
    base = {"x": [("a", "b"), ("c", "d")]}
    same = [quiet(base), quiet(base, batch_size=3, batch_tokens=9)]
    other = [
        quiet({"y": base["x"]}),
        quiet({"x": base["x"][::-1]}),
        quiet({"x": [("a", "b")], "y": [("c", "d")]}),
        quiet(base, lambda text: list(text.encode("utf-16"))),
        quiet(base, separator="\n"),
        quiet(base, score="pair"),
        quiet(base, max_length=5),
        quiet(base, max_questions=1),
    ]

    assert len({environment.fingerprint for environment in same}) == 1
    assert len({environment.fingerprint for environment in same + other}) == 1 + len(other)
    assert len(same[0].fingerprint) == 64


def test_cost_is_exposed_and_logged(model, pairs, caplog):
    environment = quiet({"x": pairs})
    with caplog.at_level(logging.INFO):
        environment.evaluate(model)
    first = environment.last_seconds
    environment.evaluate(model)

    assert first > 0
    assert environment.total_seconds == pytest.approx(first + environment.last_seconds)
    assert "on 40 questions in" in caplog.text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "setting", "argument", "shown"),
    [
        (Terminal, True, True, True),
        (Terminal, False, True, False),
        (Terminal, True, False, False),
        (io.StringIO, True, True, False),
    ],
)
def test_a_progress_bar_is_shown_on_a_terminal_unless_switched_off(
    model, pairs, monkeypatch, stream, setting, argument, shown
):
    """In a log file, it would be a line per decision."""
    monkeypatch.setattr(sys, "stderr", stream())
    Environment.from_pairs({"x": pairs}, to_bytes, progress=setting).evaluate(model, progress=argument)
    assert ("environment" in sys.stderr.getvalue()) == shown
