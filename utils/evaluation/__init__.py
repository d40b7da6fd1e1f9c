"""Features, statistics, distances, neighbours: imports utils.core."""
