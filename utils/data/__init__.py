"""Images from files to batches, and the cache of codes: imports utils.core."""
