"""Comparison of mixing policies on sampled tasks; its rules are in RULES.md."""
