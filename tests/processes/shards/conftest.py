from shard_fixtures import hundred, lock, own_cache, pairs, twenty, web, write_tar

__all__ = ["hundred", "lock", "own_cache", "pairs", "twenty", "web", "write_tar"]
