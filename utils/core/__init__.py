"""Errors, processes, files, random numbers, progress: imports no other folder."""
