"""The settings of a run, in one place.

Each entry declares how a restore treats a saved state with a different value. All entries are compared between ranks:
without that, ranks that differ would continue without an error and train on samples twice or never.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from dmagent_loader._loading.config import LoaderSettings
from dmagent_loader.policies import GuardConfig

Restore = Literal["refuse", "warn", "free"]


_REFUSE: dict[str, Restore] = {"restore": "refuse"}
"""A different value would change the order of samples: the state is refused."""
_WARN: dict[str, Restore] = {"restore": "warn"}
"""A different value would change decisions: the state is loaded with a warning."""
_FREE: dict[str, Restore] = {"restore": "free"}
"""The value may change at a restore, and is not saved."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Everything besides the ledger that determines the samples and mixes of a run.

    Args:
        seed: Seed of the sample order.
        domains: (D,) names, in order.
        domain_fields: (D,) field of each domain; the weight of a used-up domain moves inside its field.
        exhausted: (D,) exhaustion rule of each domain.
        shuffle_window: Rows of a domain that are shuffled together; None: as in the state that is loaded.
        shuffle_shards: Shards of a domain from which the rows of a window come; None: as in the state that is loaded.
        packing: Description of the packing of documents; None: rows are read as they are stored.
        fingerprint: Digest of the domains and the contents of their shards.
        samples_per_reweight: Samples, over all ranks, between two decisions; None: to be derived from the length of the
            run, which differs from no saved value.
        policy: Name of the policy; None: mixes change by hand only.
        guard: Limits on proposals.
        shadow: Whether decisions are only logged.
        history_mix: Mixes that the policy sees, ``"achieved"`` or ``"requested"``.
        on_bad_row: Rule for bad rows, ``"raise"`` or ``"skip"``.
        start_state: Digest of the start state, which a saved state carries itself.
        own_shards: Whether samples are dealt to ranks by lane.
        world_size: Number of data-parallel processes.
        loader: Loader that reads the run.
    """

    seed: int = field(metadata=_REFUSE)
    domains: tuple[str, ...] = field(metadata=_REFUSE)
    domain_fields: tuple[str, ...] = field(metadata=_REFUSE)
    exhausted: tuple[str, ...] = field(metadata=_REFUSE)
    shuffle_window: int | None = field(metadata=_REFUSE)
    shuffle_shards: int | None = field(metadata=_REFUSE)
    packing: str | None = field(metadata=_REFUSE)
    fingerprint: str = field(metadata=_REFUSE)
    samples_per_reweight: int | None = field(metadata=_WARN)
    policy: str | None = field(metadata=_WARN)
    guard: GuardConfig = field(metadata=_FREE)
    shadow: bool = field(metadata=_FREE)
    history_mix: str = field(metadata=_FREE)
    on_bad_row: str = field(metadata=_FREE)
    start_state: str = field(metadata=_FREE)
    own_shards: bool = field(metadata=_FREE)
    world_size: int = field(metadata=_FREE)
    loader: LoaderSettings = field(metadata=_FREE)

    def saved(self) -> dict[str, Any]:
        """The entries that a state carries, as JSON values."""
        values = {
            entry.name: getattr(self, entry.name) for entry in fields(self) if entry.metadata["restore"] != "free"
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_compare(self) -> dict[str, Any]:
        """All entries, by the names that messages between ranks use."""
        return {_LABELS.get(name, name): getattr(self, name) for name in RESTORE}


RESTORE: dict[str, Restore] = {entry.name: entry.metadata["restore"] for entry in fields(RunSettings)}
"""Setting -> treatment of a different value at a restore."""
_LABELS = {
    "domains": "the domains",
    "domain_fields": "the fields of the domains",
    "packing": "the packing",
    "fingerprint": "the contents of the shards",
    "loader": "the loader",
}
"""Names in messages between ranks, if they differ from the name of the attribute."""
