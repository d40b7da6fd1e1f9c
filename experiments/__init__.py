"""Scripts around the two training stages, and what they share (common.py)."""
