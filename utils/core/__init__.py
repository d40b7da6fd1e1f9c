"""Errors, processes, files, random numbers, progress. The folder imports no other folder."""
