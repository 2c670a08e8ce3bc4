"""Drawn scenes with questions and answers: what the pocket model is trained on and measured with.

`world` samples, draws and labels a scene, `questions` asks about it (with the words of `phrases`), `tokenizer` makes
the vocabulary, `score` marks answers, `dataset` turns all of it into training samples. `drawn` is apart: an easier
world as data sets of the zoo, for any family; `dialogues` (as AVSD's) and `new_colour` (for the pocket model)
likewise. Only `dataset` and these three import torch.
"""
