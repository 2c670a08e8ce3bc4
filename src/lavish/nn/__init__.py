"""Layers that two families share: only where the released weights of both run through the same math."""
