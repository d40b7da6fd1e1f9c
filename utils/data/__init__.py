"""Images from files to batches, and the cache of codes. The folder imports utils.core."""
