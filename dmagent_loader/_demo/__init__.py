"""The demo: real text that is on every machine, one small model, three ways to go on training it."""
