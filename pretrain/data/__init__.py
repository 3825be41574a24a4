"""From shards of image-text pairs to batches, in an order that is a pure function of the seed."""
