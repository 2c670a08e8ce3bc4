"""MiniGPT4-Qwen and MPP-LLaVA: config, network, processor and the rules for their weights."""
