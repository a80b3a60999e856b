"""The demo: real text that is on every machine, one small model, and four ways to continue its training."""
