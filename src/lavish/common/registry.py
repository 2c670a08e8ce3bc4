"""The registry: names of models, processors, dataset builders, tasks, runners, schedules, and the classes behind.

What is built in stands in `BUILT_IN` as "module:Class" and is imported when it is first asked for. The decorators are
for what a user adds from a module of their own; method names are those of LAVIS. Unlike there a name that is unknown
raises, with the nearest known one, and nothing registers itself by being imported.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from lavish.common.errors import ConfigError, did_you_mean

Class = TypeVar("Class", bound=type)

BUILT_IN: dict[str, dict[str, str]] = {
    "model": {
        "blip_caption": "lavish.models.blip.samples:BlipCaption",
        "blip_feature_extractor": "lavish.models.blip.samples:BlipFeatureExtractor",
        "blip_vqa": "lavish.models.blip.samples:BlipVQA",
        "chat": "lavish.runners.chat_learner:ChatLearner",
        "cogvlm": "lavish.models.cogvlm.model:CogVLMForCausalLM",
        "gpt_dialogue": "lavish.models.gpt_dialogue.samples:GPTDialogue",
        "minigpt4qwen": "lavish.models.minigpt4_qwen.samples:MiniGPT4Qwen",
    },
    "processor": {
        "base_instruction": "lavish.processors.blip_processors:BaseInstructionProcessor",
        "base_text": "lavish.processors.blip_processors:BaseTextProcessor",
        "blip2_image_train": "lavish.processors.blip_processors:Blip2ImageTrainProcessor",
        "blip_caption": "lavish.processors.blip_processors:BlipCaptionProcessor",
        "blip_image_eval": "lavish.processors.blip_processors:BlipImageEvalProcessor",
        "blip_image_train": "lavish.processors.blip_processors:BlipImageTrainProcessor",
        "blip_question": "lavish.processors.blip_processors:BlipQuestionProcessor",
        "clip_image_eval": "lavish.processors.blip_processors:ClipImageEvalProcessor",
        "clip_image_train": "lavish.processors.blip_processors:ClipImageTrainProcessor",
        "gpt_dialogue": "lavish.processors.gpt_processors:GPTDialogueTextProcessor",
        "gpt_video_ft": "lavish.processors.gpt_processors:GPTVideoFeatureProcessor",
    },
    "builder": {
        "aok_vqa": "lavish.datasets.builders.vqa_builder:AOKVQABuilder",
        "avsd_dialogue": "lavish.datasets.builders.dialogue_builder:AVSDDialBuilder",
        "captions": "lavish.datasets.builders.questions_builder:CaptionsBuilder",
        "coco_caption": "lavish.datasets.builders.caption_builder:COCOCapBuilder",
        "coco_retrieval": "lavish.datasets.builders.retrieval_builder:COCORetrievalBuilder",
        "coco_vqa": "lavish.datasets.builders.vqa_builder:COCOVQABuilder",
        "conceptual_caption_12m": "lavish.datasets.builders.image_text_pair_builder:ConceptualCaption12MBuilder",
        "conceptual_caption_3m": "lavish.datasets.builders.image_text_pair_builder:ConceptualCaption3MBuilder",
        "conversations": "lavish.datasets.builders.own_files_builder:ConversationsBuilder",
        "didemo_retrieval": "lavish.datasets.builders.retrieval_builder:DiDeMoRetrievalBuilder",
        "flickr30k": "lavish.datasets.builders.retrieval_builder:Flickr30kBuilder",
        "gqa": "lavish.datasets.builders.vqa_builder:GQABuilder",
        "imagenet": "lavish.datasets.builders.classification_builder:ImageNetBuilder",
        "laion2B_multi": "lavish.datasets.builders.image_text_pair_builder:Laion2BMultiBuilder",
        "llava_instruct_100k": "lavish.datasets.builders.instruction_builder:LlavaInstruct100kBuilder",
        "llava_instruct_156k": "lavish.datasets.builders.instruction_builder:LlavaInstruct156kBuilder",
        "llava_instruction": "lavish.datasets.builders.instruction_builder:LlavaInstructionBuilder",
        "llava_pretrain": "lavish.datasets.builders.instruction_builder:LlavaPretrainBuilder",
        "minigpt4_instruction": "lavish.datasets.builders.instruction_builder:Minigpt4InstructionBuilder",
        "msrvtt_caption": "lavish.datasets.builders.caption_builder:MSRVTTCapBuilder",
        "msrvtt_qa": "lavish.datasets.builders.classification_builder:MSRVTTQABuilder",
        "msrvtt_retrieval": "lavish.datasets.builders.retrieval_builder:MSRVTTRetrievalBuilder",
        "msvd_caption": "lavish.datasets.builders.caption_builder:MSVDCapBuilder",
        "msvd_qa": "lavish.datasets.builders.classification_builder:MSVDQABuilder",
        "nlvr": "lavish.datasets.builders.classification_builder:NLVRBuilder",
        "nocaps": "lavish.datasets.builders.caption_builder:NoCapsBuilder",
        "ok_vqa": "lavish.datasets.builders.vqa_builder:OKVQABuilder",
        "questions": "lavish.datasets.builders.questions_builder:QuestionsBuilder",
        "refcoco": "lavish.datasets.builders.own_files_builder:RefCOCOBuilder",
        "sbu_caption": "lavish.datasets.builders.image_text_pair_builder:SBUCaptionBuilder",
        "scenes_caption": "lavish.datasets.builders.scenes_builder:ScenesCaptionBuilder",
        "scenes_conversations": "lavish.datasets.builders.scenes_builder:ScenesConversationsBuilder",
        "scenes_dialogue": "lavish.datasets.builders.scenes_dialogue_builder:ScenesDialogueBuilder",
        "scenes_new_colour": "lavish.datasets.builders.scenes_new_colour_builder:ScenesNewColourBuilder",
        "scenes_vqa": "lavish.datasets.builders.scenes_builder:ScenesVQABuilder",
        "snli_ve": "lavish.datasets.builders.classification_builder:SNLIVisualEntailmentBuilder",
        "vatex_caption": "lavish.datasets.builders.caption_builder:VATEXCapBuilder",
        "vg_caption": "lavish.datasets.builders.image_text_pair_builder:VGCaptionBuilder",
        "vg_vqa": "lavish.datasets.builders.vqa_builder:VGVQABuilder",
        "videochatgpt_100k": "lavish.datasets.builders.instruction_builder:VideoChatGPT100kBuilder",
    },
    "task": {
        "aok_vqa": "lavish.tasks.vqa:AOKVQATask",
        "captioning": "lavish.tasks.captioning:CaptionTask",
        "dialogue": "lavish.tasks.dialogue:DialogueTask",
        "gqa": "lavish.tasks.vqa:GQATask",
        "grounding": "lavish.tasks.grounding:GroundingTask",
        "deepspeed_image_text_pretrain": "lavish.tasks.image_text_pretrain:ImageTextPretrainTask",
        "image_text_pretrain": "lavish.tasks.image_text_pretrain:ImageTextPretrainTask",
        "multiple_choice": "lavish.tasks.multiple_choice:MultipleChoiceTask",
        "multimodal_classification": "lavish.tasks.multimodal_classification:MultimodalClassificationTask",
        "ocr_vqa": "lavish.tasks.vqa:OCRVQATask",
        "retrieval": "lavish.tasks.retrieval:RetrievalTask",
        "scenes": "lavish.tasks.scenes:ScenesTask",
        "vqa": "lavish.tasks.vqa:VQATask",
    },
    "runner": {
        "deepspeed_runner": "lavish.runners.deepspeed_runner:DeepSpeedRunner",
        "runner_base": "lavish.runners.runner_base:RunnerBase",
        "runner_iter": "lavish.runners.runner_iter:RunnerIter",
    },
    "lr_scheduler": {
        "constant_lr": "lavish.runners.schedules:ConstantLR",
        "linear_warmup_cosine_lr": "lavish.runners.schedules:LinearWarmupCosineLR",
        "linear_warmup_cosine_lr_step-wise": "lavish.runners.schedules:LinearWarmupStepwiseCosineLR",
        "linear_warmup_linear_lr": "lavish.runners.schedules:LinearWarmupLinearLR",
        "linear_warmup_step_lr": "lavish.runners.schedules:LinearWarmupStepLR",
    },
}

BASES: dict[str, str] = {
    "model": "torch.nn:Module",
    "processor": "lavish.processors.base_processor:BaseProcessor",
    "builder": "lavish.datasets.builders.base_dataset_builder:BaseDatasetBuilder",
    "task": "lavish.tasks.base_task:BaseTask",
    "runner": "lavish.runners.runner_base:RunnerBase",
}
"""What a class of a kind has to inherit from; a kind that is not listed takes any class."""


def load_class(target: str) -> type:
    """Import the class that "module:Class" names."""
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


@dataclass
class Kind:
    """The names of one kind: a class, or the "module:Class" that is imported on first use."""

    name: str
    entries: dict[str, type | str] = field(default_factory=dict)
    base: str | None = None
    """ "module:Class" that every class of this kind inherits from."""

    def register(self, name: str) -> Callable[[Class], Class]:
        """Give the decorator that enters a class under `name`.

        Raises: ConfigError when the name is taken, is no text, or the class does not inherit from the kind's base.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(f"A {self.name} is registered under a name: @registry.register_{self.name}('my_name').")

        def decorate(cls: Class) -> Class:
            if name in self.entries:
                raise ConfigError(
                    f"The {self.name} name {name!r} is taken by {_describe(self.entries[name])}; "
                    f"register {_describe(cls)} under another name."
                )
            if not isinstance(cls, type):
                raise ConfigError(f"Only a class can be registered as {self.name} {name!r}, not {cls!r}.")
            if self.base is not None and not issubclass(cls, load_class(self.base)):
                raise ConfigError(
                    f"{_describe(cls)} cannot be the {self.name} {name!r}: it does not inherit from {self.base}."
                )
            self.entries[name] = cls
            return cls

        return decorate

    def get(self, name: str) -> type:
        """Give the class registered under `name`, importing it if it is built in.

        Raises: ConfigError when there is none.
        """
        if name not in self.entries:
            known = ", ".join(sorted(self.entries)) or f"none yet (@registry.register_{self.name} adds one)"
            raise ConfigError(
                f"No {self.name} is named {name!r}.{did_you_mean(str(name), self.entries)} Registered: {known}."
            )
        entry = self.entries[name]
        if isinstance(entry, str):
            entry = self.entries[name] = load_class(entry)
        return entry


def _describe(entry: Any) -> str:
    if isinstance(entry, str):
        return entry
    return f"{entry.__module__}:{entry.__qualname__}" if isinstance(entry, type) else repr(entry)


class Registry:
    """Names by kind, plus paths and objects that a program shares. `registry` is the one that lavish uses."""

    def __init__(self, built_in: dict[str, dict[str, str]] | None = None, bases: dict[str, str] | None = None) -> None:
        """`built_in` maps kinds to tables of "module:Class"; `bases` maps kinds to the base of their classes."""
        tables, bases = built_in or {}, bases or {}
        self._kinds = {name: Kind(name, dict(tables.get(name, {})), bases.get(name)) for name in BUILT_IN}
        self._paths: dict[str, str] = {}
        self._objects: dict[str, Any] = {}

    def register_model(self, name: str) -> Callable[[Class], Class]:
        """Decorate a model class to enter it under `name`."""
        return self._kinds["model"].register(name)

    def register_processor(self, name: str) -> Callable[[Class], Class]:
        """Decorate a processor class to enter it under `name`."""
        return self._kinds["processor"].register(name)

    def register_builder(self, name: str) -> Callable[[Class], Class]:
        """Decorate a dataset builder class to enter it under `name`."""
        return self._kinds["builder"].register(name)

    def register_task(self, name: str) -> Callable[[Class], Class]:
        """Decorate a task class to enter it under `name`."""
        return self._kinds["task"].register(name)

    def register_runner(self, name: str) -> Callable[[Class], Class]:
        """Decorate a runner class to enter it under `name`."""
        return self._kinds["runner"].register(name)

    def register_lr_scheduler(self, name: str) -> Callable[[Class], Class]:
        """Decorate a schedule of the learning rate to enter it under `name`."""
        return self._kinds["lr_scheduler"].register(name)

    def get_model_class(self, name: str) -> Any:
        """Give the model class of a name; unknown names raise ConfigError."""
        return self._kinds["model"].get(name)

    def get_processor_class(self, name: str) -> Any:
        """Give the processor class of a name; unknown names raise ConfigError."""
        return self._kinds["processor"].get(name)

    def get_builder_class(self, name: str) -> Any:
        """Give the dataset builder class of a name; unknown names raise ConfigError."""
        return self._kinds["builder"].get(name)

    def get_task_class(self, name: str) -> Any:
        """Give the task class of a name; unknown names raise ConfigError."""
        return self._kinds["task"].get(name)

    def get_runner_class(self, name: str) -> Any:
        """Give the runner class of a name; unknown names raise ConfigError."""
        return self._kinds["runner"].get(name)

    def get_lr_scheduler_class(self, name: str) -> Any:
        """Give the schedule class of a name; unknown names raise ConfigError."""
        return self._kinds["lr_scheduler"].get(name)

    def list_models(self) -> list[str]:
        """Give the sorted model names."""
        return sorted(self._kinds["model"].entries)

    def list_processors(self) -> list[str]:
        """Give the sorted processor names."""
        return sorted(self._kinds["processor"].entries)

    def list_datasets(self) -> list[str]:
        """Give the sorted names of dataset builders."""
        return sorted(self._kinds["builder"].entries)

    def list_tasks(self) -> list[str]:
        """Give the sorted task names."""
        return sorted(self._kinds["task"].entries)

    def list_runners(self) -> list[str]:
        """Give the sorted runner names."""
        return sorted(self._kinds["runner"].entries)

    def list_lr_schedulers(self) -> list[str]:
        """Give the sorted names of schedules."""
        return sorted(self._kinds["lr_scheduler"].entries)

    def register_path(self, name: str, path: str | Path, *, replace: bool = False) -> None:
        """Enter a path under a name. Raises ConfigError when the name is taken, unless it is to be replaced."""
        if name in self._paths and not replace:
            raise ConfigError(f"The path name {name!r} is taken by {self._paths[name]}.")
        self._paths[name] = str(path)

    def get_path(self, name: str) -> str:
        """Give the path of a name; unknown names raise ConfigError."""
        if name not in self._paths:
            known = ", ".join(sorted(self._paths)) or "none yet"
            raise ConfigError(f"No path is named {name!r}.{did_you_mean(name, self._paths)} Registered: {known}.")
        return self._paths[name]

    def register(self, name: str, value: Any) -> None:
        """Enter any object under a name, replacing the one that was there, as in LAVIS."""
        self._objects[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        """Give the object entered under a name, or `default`."""
        return self._objects.get(name, default)

    def unregister(self, name: str) -> Any:
        """Take out the object entered under a name and give it, or None."""
        return self._objects.pop(name, None)


registry = Registry(BUILT_IN, BASES)
registry.register_path("library_root", Path(__file__).resolve().parents[1])
