"""Integrations with trainers: each module needs its own extra and is imported separately."""
