"""Features, statistics, distances, neighbours. The folder imports utils.core."""
