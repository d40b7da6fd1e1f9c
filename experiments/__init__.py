"""The scripts that a user runs after training, and what all scripts share (common/)."""
