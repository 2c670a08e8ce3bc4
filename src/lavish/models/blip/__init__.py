"""BLIP as LAVIS ships it: captions, visual question answering, features; see docs/blip.md."""
