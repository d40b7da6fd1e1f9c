"""Runs, averages, mixed precision, compilation, meters: imports all other folders of utils."""
