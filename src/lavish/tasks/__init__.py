"""Tasks: what one training step computes and how a model is scored. One file a task."""
