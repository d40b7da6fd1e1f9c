"""Runs, averages, mixed precision, compilation, meters. The folder imports all other folders of utils."""
