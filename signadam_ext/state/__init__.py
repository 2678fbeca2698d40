"""What a parameter keeps between steps: its creation and checking, checkpoints, files."""
