"""Writing shards: documents from text and JSON lines, packed into rows of tokens, in tar files with a manifest."""
