"""GLM-4V-9B: config, network, tokenizer, processor and the rules for its weights."""
