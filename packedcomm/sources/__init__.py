"""Sources: where tensors to send come from."""
