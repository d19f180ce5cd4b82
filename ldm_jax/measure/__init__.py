"""What programs cost: operations, seconds, memory, and the same networks in PyTorch."""
