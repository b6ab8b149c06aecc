"""What it is for: answering queries with an aligned model."""
