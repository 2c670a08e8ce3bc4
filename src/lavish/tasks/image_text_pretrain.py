"""Training on pictures with texts. Source: salesforce/LAVIS, lavis/tasks/image_text_pretrain.py.

LAVIS's task evaluates nothing; here a validation split gives its loss, by which the best checkpoint is chosen.
"""

from __future__ import annotations

from lavish.tasks.dialogue import LossTask


class ImageTextPretrainTask(LossTask):
    """`image_text_pretrain`: the losses of captions or instructions."""
