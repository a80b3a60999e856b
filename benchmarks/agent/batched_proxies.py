"""Throughput of many proxies trained as one batched model, compared with the same proxies one after another.

    python -m benchmarks.agent.batched_proxies [--proxies 1 4 16] [--device cuda]

Both ways do the same work on the same rows and end with the same losses. They alternate for several rounds and the
fastest round of each counts, so that a busy machine affects both alike. Set OMP_NUM_THREADS to the cores to use.
"""

from __future__ import annotations

import argparse
import time

import torch

from dmagent_loader.training.proxies.model import ProxyConfig
from dmagent_loader.training.proxies.trainer import ProxyTrainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proxies", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--feed-forward", type=int, default=172)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--rows-per-update", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=128)
    parser.add_argument("--updates", type=int, default=8, help="updates of each proxy in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    config = ProxyConfig(
        vocab_size=args.vocabulary,
        width=args.width,
        layers=args.layers,
        feed_forward=args.feed_forward,
        rows_per_update=args.rows_per_update,
    )
    threads = torch.get_num_threads()
    print(f"{config.num_parameters:,} parameters each, {args.device}, {threads} thread{'s' * (threads > 1)}")
    print(f"{'proxies':>8} {'one by one tokens/s':>20} {'batched tokens/s':>17} {'ratio':>6} {'loss differs by':>16}")
    for count in args.proxies:
        shape = (count, args.updates * args.rows_per_update, args.row_tokens + 1)
        rows = torch.randint(0, args.vocabulary, shape, generator=torch.Generator().manual_seed(0))
        tokens = rows[:, :, 1:].numel()
        alone = [ProxyTrainer(1, config, device=args.device) for _ in range(count)]
        batched = ProxyTrainer(count, config, device=args.device)
        best = {"alone": float("inf"), "batched": float("inf")}
        # The first round is a warm-up and does not count.
        for number in range(args.rounds + 1):
            started = time.perf_counter()
            losses = torch.cat([trainer.train(rows[i : i + 1]) for i, trainer in enumerate(alone)])
            between = time.perf_counter()
            together = batched.train(rows)
            if number:
                best["alone"] = min(best["alone"], between - started)
                best["batched"] = min(best["batched"], time.perf_counter() - between)
        difference = float((losses - together).abs().max())
        ratio = best["alone"] / best["batched"]
        print(
            f"{count:>8} {tokens / best['alone']:>20,.0f} {tokens / best['batched']:>17,.0f} {ratio:>6.2f} "
            f"{difference:>16.1e}"
        )


if __name__ == "__main__":
    main()
