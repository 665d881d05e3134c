"""Token shards on disk, and the loader that packs them into training batches."""
