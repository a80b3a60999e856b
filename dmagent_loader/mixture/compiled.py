"""The loops of the order of samples in C (`_order.c`), where they were built."""

from __future__ import annotations

from dmagent_loader._compiled import compiled_loops

COMPILED = compiled_loops("dmagent_loader.mixture._order", interface=2)
