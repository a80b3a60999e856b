"""Counting the tokens of documents in a run of several processes: every rank a share, the same counts for all."""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from dmagent_loader import _distributed as distributed
from dmagent_loader.shards.packed.counts import CountedBatch, TokenCounts

ROUND_SECONDS = 20.0
"""Time between two exchanges of counts: far below the timeout of a process group, so that no rank waits in vain."""
_STEP = "counting tokens"


def count_on_all_ranks(counts: TokenCounts, *, progress: bool) -> None:
    """Counts what any rank has not counted before. A process alone counts when it opens the rows.

    Args:
        counts: Counts of the same shards and tokenizer on all ranks.
        progress: Whether to show a progress bar over the documents that are tokenised.

    Raises:
        ShardError: This rank could not read a document.
        RankError: Another rank could not, or does not answer.
    """
    world_size = distributed.get_world_size()
    if world_size == 1:
        return
    with distributed.together(_STEP):
        lacking = counts.missing()
    missing = distributed.all_reduce_sum(lacking.astype(np.float64), _STEP) > 0
    share = counts.count_share(missing, distributed.get_rank(), world_size)
    documents = counts.documents(missing)
    with tqdm(
        total=documents, unit=" documents", desc=_STEP, mininterval=0.5, disable=not (progress and documents)
    ) as bar:
        is_done = not documents
        while not is_done:
            found: list[CountedBatch] = []
            end = time.monotonic() + ROUND_SECONDS
            with distributed.together(_STEP):
                for batch in share:
                    found.append(batch)
                    if time.monotonic() > end:
                        break
            gathered = distributed.all_gather_object(found, _STEP)
            for of_rank in gathered:
                counts.add(of_rank)
                bar.update(sum(len(batch.counts) for batch in of_rank))
            is_done = not any(gathered)
