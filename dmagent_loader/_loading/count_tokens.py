"""Counting the tokens of documents in a run of several processes: every rank a share, the same counts for all."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dmagent_loader._loading.meeting import work_together
from dmagent_loader.shards.index.peers import Peers
from dmagent_loader.shards.index.sharing import lacking_on_ranks
from dmagent_loader.shards.packed.counts import CountedBatch, TokenCounts

ROUND_SECONDS = 20.0
"""Time between two exchanges of counts. Those of complete shards are saved then."""
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
    work_together(_STEP, lambda peers: _count(counts, peers, progress=progress))


def _count(counts: TokenCounts, peers: Peers, *, progress: bool) -> None:
    if peers.size == 1:
        return
    missing: NDArray[np.bool_] = np.logical_or.reduce(lacking_on_ranks(peers, counts.missing()), axis=0)
    share = counts.count_share(missing, peers.rank, peers.size)
    documents = counts.documents(missing)
    with tqdm(
        total=documents, unit=" documents", desc=_STEP, mininterval=0.5, disable=not (progress and documents)
    ) as bar:
        is_done = not documents
        while not is_done:
            found: list[CountedBatch] = []
            end = time.monotonic() + ROUND_SECONDS
            for batch in share:
                found.append(batch)
                if time.monotonic() > end or peers.stop.is_set():
                    break
            gathered = peers.gather(found)
            for of_rank in gathered:
                counts.add(of_rank)
                bar.update(sum(len(batch.counts) for batch in of_rank))
            is_done = not any(gathered)
