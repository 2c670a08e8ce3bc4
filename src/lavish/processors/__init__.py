"""What turns pictures and text into tensors, shared by the families: exact resizing, tokenizers."""
