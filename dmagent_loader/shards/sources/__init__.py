"""Where the bytes come from: local files and remote objects. The only folder that opens shards or sockets."""
