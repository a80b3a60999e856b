from shard_fixtures import own_cache

__all__ = ["own_cache"]
