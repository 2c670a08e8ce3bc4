"""Drawn scenes with questions and answers: what the pocket model is trained on and measured with."""
