"""Everything between a loss and a trained model: step, optimizer, sharding, checkpoints, logs, the loop."""
