"""Loading a model and talking with it: chat, stream and batch, sampling, quantisation."""
