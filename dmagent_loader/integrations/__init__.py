"""Trainers: each module needs its own extra and is imported on its own."""
