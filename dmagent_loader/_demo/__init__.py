"""The demo: real text that is on every machine, one small model, and three ways to continue its training."""
