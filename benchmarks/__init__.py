"""What a training step costs, side by side with peers."""
