"""What a run leaves and starts from: its directory, checkpoints and logs."""
