"""Our log-likelihoods are those of the real lm-evaluation-harness, on the same requests and the same model."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dmagent_loader.environment import Environment

huggingface = pytest.importorskip("lm_eval.models.huggingface")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MAX_LENGTH = 96
VOCABULARY = (
    "the of and to in that was his it with as had for not he but at on is her which be from all have mixing agent "
    "domain weights gradient tensor 12 345 x=y; def return if: else: naïve café 数学 🙂 don't e.g. $\\frac{1}{2}$"
)
WORDS = VOCABULARY.split()


def texts(number: int, longest: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest))) for _ in range(number)]


@pytest.fixture(scope="module", params=["adds_bos", "adds_nothing"])
def tokenizer(request):
    """A byte-level BPE trained on the spot; Llama's habit of a BOS token in front, and GPT-2's of none."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts(300, 30, seed=1), trainer)
    if request.param == "adds_bos":
        bpe.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.3,  # far from uniform predictions, so that a position off by one shows
    )
    return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[str, str]]:
    """200 pairs: plain, white space around the seam, empty and BOS contexts, and contexts that do not fit."""
    questions, answers = texts(200, 25, seed=2), texts(200, 8, seed=3)
    for i in range(200):
        match i % 10:
            case 1:
                questions[i] += "  "
            case 2:
                questions[i] += "\n"
                answers[i] = "    " + answers[i]
            case 3:
                questions[i] = ""
            case 4:
                questions[i] = "<s>" + questions[i]
            case 5:
                questions[i] = " ".join([questions[i]] * 40)
            case 6:
                questions[i] = questions[i][:1]
            case 7:
                questions[i] = questions[i] + "\nA. yes\nB. no\n\t "
            case 8:
                answers[i] = answers[i] + " \n"
    questions[13], answers[13] = "", "<s>" + answers[13]
    return list(zip(questions, answers, strict=True))


def harness(model, tokenizer, requests: list[tuple[str, str]]) -> np.ndarray:
    """Summed log-likelihoods of the real package.

    Without its logits cache: in 0.4.13 that mixes up requests of equal tokens whose answers differ in length (asked
    alone, or without the cache, such a request gets the value that we get).
    """
    lm = huggingface.HFLM(pretrained=model.eval(), tokenizer=tokenizer, batch_size=16, logits_cache=False)
    instances = [SimpleNamespace(args=request) for request in requests]
    return np.array([value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)])


def test_log_likelihoods_equal_the_harness_on_200_requests(model, tokenizer, pairs):
    """Catches: tokens of question and answer encoded apart, white space left in the context, truncation off by one."""
    environment = Environment.from_pairs({"mixed": pairs}, tokenizer, progress=False)
    expected = harness(model, tokenizer, environment.requests["mixed"])

    ours = environment.log_likelihoods(model)["mixed"]

    assert len(ours.sums) == 200
    np.testing.assert_allclose(ours.sums, expected, rtol=0, atol=1e-4)


def test_feedback_is_the_mean_of_the_harness_likelihoods_per_token(model, tokenizer, pairs):
    environment = Environment.from_pairs({"even": pairs[::2], "odd": pairs[1::2]}, tokenizer, progress=False)

    feedback = environment.evaluate(model)

    for field, requests in environment.requests.items():
        num_tokens = environment.log_likelihoods(model)[field].num_tokens
        expected = np.mean(harness(model, tokenizer, requests) / num_tokens)
        assert feedback[field] == pytest.approx(expected, abs=1e-5)


def test_feedback_is_equal_with_the_tokenizers_library_alone(model, tokenizer, pairs):
    """The bare tokenizer has no idea of BOS, so the prefix token must be given."""
    pairs = [pair for pair in pairs if "<s>" not in pair[0]]
    full = Environment.from_pairs({"mixed": pairs}, tokenizer, progress=False)
    bare = Environment.from_pairs(
        {"mixed": pairs}, tokenizer.backend_tokenizer, prefix_token_id=tokenizer.bos_token_id, progress=False
    )

    assert bare.evaluate(model) == full.evaluate(model)
    assert bare.fingerprint == full.fingerprint
