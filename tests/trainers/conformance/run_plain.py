"""A plain PyTorch loop, with DistributedDataParallel where there are several processes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import islice
from pathlib import Path

import torch
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
from torch.utils.tensorboard import SummaryWriter

from dmagent_loader import MixingDataLoader
from dmagent_loader.integrations.mixing import Mixing


def main() -> None:
    options = parser().parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    mixing = Mixing(build_sampler(options), build_environment())
    torch.manual_seed(0)
    model = TinyModel(options.dropout)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(rank)
    recorder = Recorder(options, rank)
    writer = SummaryWriter(str(options.out / "logs")) if rank == 0 else None
    step = 0
    if options.resume:
        saved = torch.load(Path(options.resume, f"rank-{rank}.pt"), weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        mixing.load_state_dict(saved["mixing"])
        torch.set_rng_state(saved["random"])
        step = recorder.step = saved["step"]

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
            for name, value in report.full.items() if writer else ():
                writer.add_scalar(name, value, step)
        if options.save_every and step and step % options.save_every == 0:
            save(options.out / "checkpoints", rank, step, model, optimizer, mixing)
        recorder.step_done(step)
        if step >= options.steps or mixing.finished():
            break
        if batches is None:
            batches = iter(loader)  # after the first decision: data workers begin to read now
        group = list(islice(batches, options.accumulation))
        for number, batch in enumerate(group):
            recorder.batch(batch["__index__"], batch["key"])
            last = number == len(group) - 1
            with nullcontext() if last or world == 1 else wrapped.no_sync():
                (next_token_loss(wrapped(batch["input_ids"]), batch["input_ids"]) / len(group)).backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        mixing.consumed += sum(len(batch["__index__"]) for batch in group) * world

    if writer:
        writer.close()
    write_result(
        options,
        rank,
        mixing.sampler,
        consumed=mixing.consumed,
        global_step=step,
        model=model,
        metrics=tensorboard_metrics(options.out) if rank == 0 else None,
    )
    leave()


def save(folder: Path, rank: int, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, mixing: Mixing):
    folder.mkdir(parents=True, exist_ok=True)
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"mixing": mixing.state_dict(), "random": torch.get_rng_state()}
    torch.save(state, folder / f"rank-{rank}.tmp")
    (folder / f"rank-{rank}.tmp").replace(folder / f"rank-{rank}.pt")


if __name__ == "__main__":
    main()
