"""Block families: what a full and a cached step of a block does, whoever wrote the block."""
