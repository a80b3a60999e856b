"""A loop of one's own with Accelerate: model and optimizer are prepared, the sampler's loader is not."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from parts import (
    Recorder,
    TinyModel,
    build_environment,
    build_sampler,
    leave,
    next_token_loss,
    parser,
    tensorboard_metrics,
    write_result,
)

from dmagent_loader import MixingDataLoader
from dmagent_loader.integrations.mixing import Mixing


def main() -> None:
    options = parser().parse_args()
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=str(options.out))
    accelerator.init_trackers("logs")
    rank, world = accelerator.process_index, accelerator.num_processes
    mixing = Mixing(build_sampler(options), build_environment())
    torch.manual_seed(0)
    plain_model = TinyModel(options.dropout)
    model, optimizer = accelerator.prepare(plain_model, torch.optim.AdamW(plain_model.parameters(), lr=1e-2))
    accelerator.register_for_checkpointing(mixing)
    torch.manual_seed(rank)
    recorder = Recorder(options, rank)
    samples_per_step = options.batch_size * world * options.accumulation
    if options.resume:
        folder = max(Path(options.resume).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
        accelerator.load_state(str(folder))
        # Accelerate itself does not insist on it.
        safely = torch.load(folder / "custom_checkpoint_0.pkl", weights_only=True)
        # With changed data the state has a new segment already; the test looks at the run.
        assert options.data == "changed" or safely == mixing.state_dict()
    step = recorder.step = mixing.consumed // samples_per_step

    loader = MixingDataLoader(
        mixing.sampler,
        batch_size=options.batch_size,
        num_workers=options.workers,
        generator=torch.Generator().manual_seed(0),
    )
    mixing.begin()
    batches = None
    while True:
        if mixing.due():
            report = mixing.reweight(lambda environment: environment.evaluate(model))
            accelerator.log(dict(report.full), step=step)
        if options.save_every and step and step % options.save_every == 0:
            accelerator.save_state(str(options.out / "checkpoints" / f"step-{step}"))
        recorder.step_done(step)
        if step >= options.steps or mixing.finished():
            break
        if batches is None:
            batches = iter(loader)  # after the first decision: data workers begin to read now
        group = list(islice(batches, options.accumulation))
        for number, batch in enumerate(group):
            recorder.batch(batch["__index__"], batch["key"])
            with nullcontext() if number == len(group) - 1 else accelerator.no_sync(model):
                logits = model(batch["input_ids"].to(accelerator.device))
                accelerator.backward(next_token_loss(logits, batch["input_ids"]) / len(group))
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mixing.consumed += sum(len(batch["__index__"]) for batch in group) * world

    for tracker in accelerator.trackers:
        tracker.finish()
    write_result(
        options,
        rank,
        mixing.sampler,
        consumed=mixing.consumed,
        global_step=step,
        model=plain_model,
        metrics=tensorboard_metrics(options.out) if rank == 0 else None,
    )
    leave()


if __name__ == "__main__":
    main()
