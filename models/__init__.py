"""The networks, in pure torch: no files, no devices by name, no dashboard."""
