"""The scripts that a user runs after training. The folder common/ holds the code that all scripts share."""
