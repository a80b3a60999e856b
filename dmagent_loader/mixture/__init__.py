"""The mix as data: domains, weights, ledger, and the plan that turns them into an order of samples.

Everything here is a pure function of its arguments: numpy only; no files, no clock, no torch.

The plan is the heart of the package. A ledger records the global sample index from which each mix applies. Within one
mix, `domain_order` assigns a domain to every index, and every prefix of that order matches the mix. `row_order` assigns
a row to each draw of a domain, without replacement. Both are closed-form, so any index is found without visiting the
earlier ones: ``(seed, ledger, index) -> (domain, shard, row)``. `sharding` selects the indices that one rank or data
worker delivers.
"""

from dmagent_loader.mixture.domains import CANONICAL_TOPICS, DomainSpace
from dmagent_loader.mixture.history import History
from dmagent_loader.mixture.ledger import Ledger, LedgerEntry
from dmagent_loader.mixture.length import RunLength
from dmagent_loader.mixture.plan import Plan

__all__ = ["CANONICAL_TOPICS", "DomainSpace", "History", "Ledger", "LedgerEntry", "Plan", "RunLength"]
