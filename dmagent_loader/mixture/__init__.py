"""The mix as data: domains, weights, ledger, and the plan that turns them into an order of samples.

Everything here is a pure function of its arguments: numpy only; no files, no clock, no torch.

The plan is the heart of the package. A ledger says from which global sample index each mix holds. Within one mix,
`domain_order` gives every index a domain such that each prefix keeps the mix, and `row_order` gives each draw of a
domain a row, without replacement. Both work in closed form, so any index is found without going through those before
it: ``(seed, ledger, index) -> (domain, shard, row)``. `sharding` then says which indices one rank or data worker
delivers.
"""

from dmagent_loader.mixture.domains import CANONICAL_TOPICS, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.ledger import Ledger, LedgerEntry
from dmagent_loader.mixture.plan import Plan

__all__ = ["CANONICAL_TOPICS", "DomainSpace", "History", "Ledger", "LedgerEntry", "Plan"]
