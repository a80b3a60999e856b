"""Sources of bytes: local files and remote objects. Only this folder opens shards for reading, or sockets."""
