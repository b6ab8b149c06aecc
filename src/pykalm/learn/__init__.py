"""How it learns: losses, batches, gradient caching, the training loop."""
