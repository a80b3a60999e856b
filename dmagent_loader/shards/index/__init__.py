"""Indexes of shards: where each row lies, cached on disk and checked against what was written."""
