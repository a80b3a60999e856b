"""The loops of the order of samples in C (`_order.c`, `_rows.c`), where they were built."""

from __future__ import annotations

from dmagent_loader._compiled import compiled_loops

ORDER = compiled_loops("dmagent_loader.mixture._order")
ROWS = compiled_loops("dmagent_loader.mixture._rows")
