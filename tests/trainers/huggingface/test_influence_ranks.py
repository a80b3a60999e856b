"""The stock Trainer on two ranks, in bfloat16, with low-rank adapters: a probe leaves no trace."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from launching import REPOSITORY, environment, python

WORKER = """
import json, sys
from pathlib import Path
import torch
from torch import distributed as dist, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from dmagent_loader import AgentWeightedSampler, Environment, ReadingConfig
from dmagent_loader.integrations.huggingface import DataMixingCallback
from dmagent_loader.policies import StaticPolicy
from dmagent_loader.testing import write_toy_shards
from dmagent_loader.transforms import packed_tokens

folder = Path(sys.argv[1])
DOMAINS = {"source/Science": 60, "source/News": 60, "target/code": 60, "target/math": 60}
PAIRS = {"keep": [("12", "34"), ("5 6", "78"), ("a", "b")], "acquire": [("x =", " y"), ("q", "r"), ("s", "t")]}


class Adapter(nn.Module):
    def __init__(self, frozen):
        super().__init__()
        self.frozen, self.dropout = frozen, nn.Dropout(0.1)
        self.down = nn.Linear(frozen.in_features, 2, bias=False)
        self.up = nn.Linear(2, frozen.out_features, bias=False)

    def forward(self, x):
        return self.frozen(x) + self.up(self.down(self.dropout(x)))


def train(name, policy):
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=64, **size))
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.mlp.up_proj = Adapter(layer.self_attn.q_proj), Adapter(layer.mlp.up_proj)
    arguments = TrainingArguments(
        str(folder / name), per_device_train_batch_size=4, max_steps=12, learning_rate=1e-2, report_to=[],
        save_strategy="no", disable_tqdm=True, use_cpu=True, bf16=True, seed=1,
    )
    sampler = AgentWeightedSampler(
        {d: [str(f) for f in sorted((folder / "shards").glob(f"{d}/*.tar"))] for d in DOMAINS}, policy=policy,
        samples_per_reweight=32, transform=packed_tokens, exhausted="repeat", reading=ReadingConfig(progress=False),
    )
    questions = Environment.from_pairs(PAIRS, lambda text: [ord(c) % 64 for c in text], progress=False)
    trainer = Trainer(model, arguments, train_dataset=sampler, callbacks=[DataMixingCallback(sampler, questions)])
    trainer.train()
    state = trainer.optimizer.state_dict()["state"]
    moments = [torch.as_tensor(value) for entry in state.values() for value in entry.values()]
    return sampler, [parameter.detach().clone() for parameter in model.parameters()], moments


dist.init_process_group("gloo")
if dist.get_rank() == 0:
    write_toy_shards(folder / "shards", DOMAINS, tokens=24)
dist.barrier()
found, weights, moments = train("probed", "influence")
given, others, other_moments = train("given", StaticPolicy(found.space.as_dict(found.ledger.last.weights())))
before = train("untrained-mix", StaticPolicy({d: 0.25 for d in DOMAINS}))[1]
report = {
    "way": found.policy.influence.way,
    "weights": all(map(torch.equal, weights, others)),
    "moments": len(moments) > 0 and all(map(torch.equal, moments, other_moments)),
    "mixes differ": not all(map(torch.equal, weights, before)),
}
(folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(report))
dist.barrier()
"""


def test_weights_and_moments_after_a_probe_on_two_ranks_are_those_without_one(tmp_path: Path) -> None:
    """The same mix, once found by a probe and once given. Another mix ends elsewhere, so the comparison can fail."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [*python(2), str(worker), str(tmp_path)]
    done = subprocess.run(
        command, env=environment(), cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = {"way": "gradient", "weights": True, "moments": True, "mixes differ": True}
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)] == [expected, expected]
