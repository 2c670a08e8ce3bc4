"""GPTDialogue: GPT-2 that answers questions about a video from its features; config, network, processor, weights."""
