"""A family of small continual pre-training tasks, on which mixing policies are trained and compared (docs/tasks.md)."""
