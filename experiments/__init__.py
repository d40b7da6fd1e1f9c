"""Scripts for the two training stages, and what they share (common/)."""
