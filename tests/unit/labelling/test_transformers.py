"""The architectures of NVIDIA's and WebOrganizer's classifiers: small random weights in the published layouts.

Each is compared with a computation of its own from the same weights, text by text.
"""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F

from dmagent_loader.errors import CheckpointError, ConfigurationError
from dmagent_loader.labelling import deberta
from dmagent_loader.labelling import web_organizer as web_organizer_module
from dmagent_loader.labelling.classifier import load_classifier
from dmagent_loader.labelling.labels import Labeller
from dmagent_loader.labelling.taxonomy import WEB_ORGANIZER
from dmagent_loader.mixture.domains import CANONICAL_TOPICS

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [f"w{n}" for n in range(60)]
TEXTS = ["w1 w2 w3", " ".join(WORDS), "", " ".join(WORDS[:20] * 40), "w5", "w7 w9 w11 " * 20]
WIDTH, LAYERS = 128, 2


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


def save(folder: Path, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(
        {name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors"
    )
    vocabulary = {token: n for n, token in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def ids_of(text: str, characters: int, tokens: int) -> torch.Tensor:
    words = [WORDS.index(word) + 4 if word in WORDS else 3 for word in text[:characters].split()]
    return torch.tensor([[1, *words[: tokens - 2], 2]])


class Published(torch.nn.Module):
    """The module of NVIDIA's model card: the backbone is ``model``, the linear layer ``fc``."""

    def __init__(self, labels: int) -> None:
        super().__init__()
        config = transformers.DebertaV2Config(
            vocab_size=64,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=WIDTH // 64,
            intermediate_size=96,
            position_buckets=16,
            relative_attention=True,
            max_relative_positions=-1,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            pos_att_type="p2c|c2p",
            position_biased_input=False,
            type_vocab_size=0,
            layer_norm_eps=1e-7,
        )
        self.model = transformers.AutoModel.from_config(config)
        self.fc = torch.nn.Linear(WIDTH, labels)


def nvidia(folder: Path, labels: tuple[str, ...]) -> tuple[Path, Published]:
    torch.manual_seed(0)
    module = Published(len(labels)).eval()
    for parameter in module.parameters():  # the initial weights are so small that all texts look alike
        torch.nn.init.normal_(parameter, std=0.3)
    config = {
        "base_model": "microsoft/deberta-v3-base",
        "fc_dropout": 0.2,
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
    }
    return save(folder, config, module.state_dict()), module


@pytest.mark.parametrize(
    ("labels", "characters", "tokens"), [(CANONICAL_TOPICS, 2000, 512), (("High", "Medium", "Low"), 6000, 1024)]
)
def test_nvidias_classifiers(tmp_path: Path, labels: tuple[str, ...], characters: int, tokens: int) -> None:
    """Against the published module, text by text without padding: token 0, no dropout, softmax, truncation."""
    folder, module = nvidia(tmp_path / "classifier", labels)
    texts = [*TEXTS, "w1 " * 700 + "w2", "w3 w4 " * 2000, ("x" * 199 + " ") * 40 + "w1"]
    classifier = load_classifier(folder, device="cpu", batch_size=3)
    found = classifier.probabilities(texts)
    with torch.inference_mode():
        hidden = [module.model(ids_of(text, characters, tokens)).last_hidden_state[0, 0] for text in texts]
        expected = torch.stack([F.softmax(module.fc(row), dim=-1) for row in hidden])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[:, 0].max() > 1.1 * found[:, 0].min()
    assert classifier.labels == labels
    assert classifier.name.startswith("classifier (")


def test_a_pickled_classifier_is_loaded_again(tmp_path: Path) -> None:
    """Workers get it so; each chooses its own device, and the weights are not sent."""
    folder, _ = nvidia(tmp_path / "classifier", CANONICAL_TOPICS)
    classifier = load_classifier(folder, device="cpu", batch_size=3)
    pickled = pickle.dumps(classifier)
    copy = pickle.loads(pickled)
    assert len(pickled) < 1000
    assert (copy.name, copy.batch_size) == (classifier.name, 3)
    assert np.array_equal(copy.probabilities(TEXTS), classifier.probabilities(TEXTS))


@pytest.mark.parametrize("make", ["nvidia", "web_organizer"])
def test_half_precision_as_on_a_gpu_gives_nearly_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str
) -> None:
    """The weights in bfloat16 and batches with padding, on the CPU: the classes are those of float32."""
    folder = nvidia(tmp_path, CANONICAL_TOPICS)[0] if make == "nvidia" else web_organizer(tmp_path)[0]
    texts = ["w1 w2 w3", "w5", "w7 w9 w11 w13"]  # short, because processors have no instructions for this type
    expected = load_classifier(folder, device="cpu", batch_size=2).probabilities(texts)
    module = deberta if make == "nvidia" else web_organizer_module
    seen = []

    def in_half(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
        model = model.eval().to(device, torch.bfloat16)
        model.register_forward_hook(lambda *call: seen.append(call[2]))
        return model

    monkeypatch.setattr(module, "placed", in_half)
    found = load_classifier(folder, device="cpu", batch_size=2).probabilities(texts)
    assert len(seen) == 2
    np.testing.assert_allclose(found.sum(axis=1), 1)
    np.testing.assert_allclose(found, expected, atol=0.1)
    sure = np.sort(expected)[:, -1] - np.sort(expected)[:, -2] > 0.2
    assert sure.any()
    assert (found.argmax(axis=1) == expected.argmax(axis=1))[sure].all()
    assert not np.allclose(found, expected, atol=1e-6), "nothing was rounded"


def test_labels_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    folder, _ = nvidia(tmp_path / "classifier", CANONICAL_TOPICS)
    config = json.loads((folder / "config.json").read_text())
    config["label2id"] = dict(reversed(config["label2id"].items()))
    (folder / "config.json").write_text(json.dumps(config))
    assert load_classifier(folder).labels == CANONICAL_TOPICS


NEW = {
    "model_type": "new",
    "architectures": ["NewForSequenceClassification"],
    "auto_map": {"AutoModelForSequenceClassification": "Alibaba-NLP/new-impl--modeling.NewForSequenceClassification"},
    "vocab_size": 64,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "hidden_act": "gelu",
    "max_position_embeddings": 256,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "rope_theta": 500000,
    "rope_scaling": {"factor": 2.0, "type": "ntk"},
    "pack_qkv": True,
    "logn_attention_scale": False,
    "id2label": {str(n): str(n) for n in range(24)},
    "pad_token_id": 0,
}


def web_organizer(folder: Path, **changed: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    weights = {"new.embeddings.word_embeddings.weight": random(64, WIDTH)}
    shapes = {"new.embeddings.LayerNorm": (WIDTH,), "new.pooler.dense": (WIDTH, WIDTH), "classifier": (24, WIDTH)}
    for layer in range(LAYERS):
        at = f"new.encoder.layer.{layer}"
        shapes |= {
            f"{at}.attention.qkv_proj": (3 * WIDTH, WIDTH),
            f"{at}.attention.o_proj": (WIDTH, WIDTH),
            f"{at}.mlp.down_proj": (WIDTH, 96),
            f"{at}.attn_ln": (WIDTH,),
            f"{at}.mlp_ln": (WIDTH,),
        }
        weights[f"{at}.mlp.up_gate_proj.weight"] = random(192, WIDTH)
    for name, shape in shapes.items():
        weights |= {f"{name}.weight": random(*shape) + (len(shape) == 1), f"{name}.bias": random(shape[0])}
    return save(folder, {**NEW, **changed}, weights), weights


def new_logits(weights: Mapping[str, torch.Tensor], ids: torch.Tensor, factor: float) -> torch.Tensor:
    """The published network: post-norm, rotary positions, queries, keys and values in one projection, gated MLP."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    heads, width = 4, WIDTH // 4
    frequencies = 1 / (500000 * factor) ** (torch.arange(0, width, 2) / width) / factor ** (2 / width)
    angles = torch.outer(torch.arange(ids.shape[1]), frequencies).repeat(1, 2)
    hidden = norm(weights["new.embeddings.word_embeddings.weight"][ids[0]], "new.embeddings.LayerNorm")
    for layer in range(LAYERS):
        at = f"new.encoder.layer.{layer}"
        parts = linear(hidden, f"{at}.attention.qkv_proj").split(WIDTH, dim=-1)
        query, key, value = (part.unflatten(-1, (heads, width)).transpose(0, 1) for part in parts)
        scores = rotated(query) @ rotated(key).transpose(-1, -2) / width**0.5
        mixed = (scores.softmax(dim=-1) @ value).transpose(0, 1).flatten(1)
        hidden = norm(hidden + linear(mixed, f"{at}.attention.o_proj"), f"{at}.attn_ln")
        up, gate = linear(hidden, f"{at}.mlp.up_gate_proj").chunk(2, dim=-1)
        hidden = norm(hidden + linear(F.gelu(gate) * up, f"{at}.mlp.down_proj"), f"{at}.mlp_ln")
    return linear(torch.tanh(linear(hidden[0], "new.pooler.dense")), "classifier")


@pytest.mark.parametrize(("scaling", "factor"), [({"factor": 2.0, "type": "ntk"}, 2.0), (None, 1.0)])
def test_web_organizers_classifier(tmp_path: Path, scaling: Any, factor: float) -> None:
    """Against the published computation; forgetting the scaling of the rotary positions changes long texts."""
    folder, weights = web_organizer(tmp_path / "topics", rope_scaling=scaling)
    classifier = load_classifier(folder, device="cpu", batch_size=3)
    found = classifier.probabilities(TEXTS)
    expected = torch.stack([new_logits(weights, ids_of(text, 10**6, 8192), factor).softmax(-1) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    other = torch.stack([new_logits(weights, ids_of(text, 10**6, 8192), 3 - factor).softmax(-1) for text in TEXTS])
    assert np.abs(found - other.numpy()).max() > 1e-3
    assert classifier.labels == tuple(WEB_ORGANIZER)
    Labeller(classifier)


def test_texts_of_one_batch_do_not_change_each_other(tmp_path: Path) -> None:
    for folder in (nvidia(tmp_path / "a", CANONICAL_TOPICS)[0], web_organizer(tmp_path / "b")[0]):
        together, alone = (load_classifier(folder, device="cpu", batch_size=n).probabilities(TEXTS) for n in (6, 1))
        np.testing.assert_allclose(together, alone, atol=1e-5)


def test_checkpoints_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    folder, _ = nvidia(tmp_path / "a", CANONICAL_TOPICS)
    config = json.loads((folder / "config.json").read_text())

    def refused(message: str, **changed: Any) -> None:
        (folder / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(CheckpointError, match=message):
            load_classifier(folder)

    refused("has the backbone 'roberta-base'", base_model="roberta-base")
    refused("does not number its labels", label2id={"Adult": 0, "Games": 2})
    refused("do not fit", label2id={"Adult": 0, "Games": 1})
    with pytest.raises(ConfigurationError, match="batch_size is 0"):
        load_classifier(folder, batch_size=0)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="neither of the known kinds"):
        load_classifier(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="other formats than safetensors are not loaded"):
        load_classifier(folder)
    other, _ = web_organizer(tmp_path / "b", rope_scaling={"type": "dynamic", "factor": 2.0})
    with pytest.raises(CheckpointError, match="not fixed NTK"):
        load_classifier(other)
    another, _ = web_organizer(tmp_path / "c", layer_norm_type="rms_norm")
    with pytest.raises(CheckpointError, match="rms_norm"):
        load_classifier(another)
