"""lavish: load, chat with, fine-tune, evaluate, convert and serve a generation of open vision-language models."""

__version__ = "0.1.0"
