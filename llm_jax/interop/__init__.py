"""Model files of other tools: what their config fields and tensors are called, and how they lie in the file."""
