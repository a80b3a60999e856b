"""WebDataset tar shards, read by position: index, reader, decoders, writer."""
