"""AVSD as a package of its own: importing it registers a data set, processors, a model and a task with lavish."""

from avsd.builders import MyAVSDBuilder
from avsd.datasets import MyAVSDDataset, MyAVSDEvalDataset
from avsd.models import MyGPTDialogue
from avsd.processors import MyDialogueProcessor, MyVideoProcessor
from avsd.tasks import MyDialogueTask

__all__ = [
    "MyAVSDBuilder",
    "MyAVSDDataset",
    "MyAVSDEvalDataset",
    "MyDialogueProcessor",
    "MyDialogueTask",
    "MyGPTDialogue",
    "MyVideoProcessor",
]
