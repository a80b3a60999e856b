"""The tar format. `scan` reads a file once and finds its members and every gap between them.

Damage is reported: a zeroed header or a cut at a record boundary is never mistaken for the end of the file.
"""

from dmagent_loader.shards.tar.damage import (
    ShardDamage,
    assess_damage,
    incomplete_rows,
    rows_that_lack_members,
    stored_before,
)
from dmagent_loader.shards.tar.header import BLOCK, padded, parse_header
from dmagent_loader.shards.tar.members import Gap, MemberTable, shown
from dmagent_loader.shards.tar.scanner import KeyEnd, ScanStopped, scan

__all__ = [
    "BLOCK",
    "Gap",
    "KeyEnd",
    "MemberTable",
    "ScanStopped",
    "ShardDamage",
    "assess_damage",
    "incomplete_rows",
    "padded",
    "parse_header",
    "rows_that_lack_members",
    "scan",
    "shown",
    "stored_before",
]
