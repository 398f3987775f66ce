"""The Triton path: address tables, buckets of tiles, a handful of launches."""
