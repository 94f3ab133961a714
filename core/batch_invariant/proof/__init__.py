"""Evidence that a kernel keeps its promise: transforms of the batch, compared bit for bit."""
