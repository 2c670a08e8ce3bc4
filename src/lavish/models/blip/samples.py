"""BLIP behind LAVIS's interface of samples: `blip_caption`, `blip_vqa` and `blip_feature_extractor`.

A sample is a dict with `image` (batch, 3, size, size), as the processor `blip_image_eval` makes it, or pictures, and
`text_input`. Source: salesforce/LAVIS, lavis/models/blip_models/{blip_caption,blip_vqa,blip_feature_extractor,
blip_image_text_matching}.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedTokenizerBase

from lavish.checkpoints import deepspeed
from lavish.checkpoints.layouts import config_folder
from lavish.common.errors import ConfigError, DataError, PromptError, did_you_mean, shown
from lavish.models.base_model import local_file, model_section, read_fields
from lavish.models.blip import opening
from lavish.models.blip.base import BlipBase, part
from lavish.models.blip.beam_search import Rules, generate
from lavish.models.blip.config import ARCHITECTURES
from lavish.models.blip.model import IGNORE_INDEX, answer_losses, caption_labels
from lavish.models.blip.opening import tell
from lavish.models.blip.outputs import BlipIntermediateOutput, BlipOutput, BlipOutputFeatures
from lavish.models.blip.processor import DECODE_TOKEN, ENCODE_TOKEN, BlipProcessor, find_tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

NUCLEUS_PENALTY = 1.1
"""`repetition_penalty` of nucleus sampling in LAVIS, whatever the caller asks; here where the caller asks nothing."""
LARGE_WIDTH = 1024
"""Of the large tower's hidden states."""


class BlipCaption(BlipBase):
    """Captions."""

    arch = "blip_caption"
    PRETRAINED_MODEL_CONFIG_DICT = {
        "base_coco": "configs/models/blip_caption_base_coco.yaml",
        "large_coco": "configs/models/blip_caption_large_coco.yaml",
    }

    def forward(self, samples: Mapping[str, Any]) -> BlipOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the loss of captions; `text_input` holds the prompt already, which is not learnt.

        Raises:
            DataError: no text is longer than the prompt, so that there is nothing to learn.
        """
        image_embeds = self.image_states(samples)
        input_ids, attention_mask = self._moved(self.processor.captions(self._texts(samples, len(image_embeds))))
        labels = caption_labels(input_ids, attention_mask, self.prompt_length)
        if not (labels != IGNORE_INDEX).any():
            raise DataError(
                f"text_input: none of the {len(labels)} texts is longer than the prompt {self.prompt!r} "
                f"({self.prompt_length} ids), which is not learnt. Put the prompt before each caption (blip_caption "
                "does), or set model.prompt = ''."
            )
        output = self.network.text_decoder(
            input_ids=input_ids, attention_mask=attention_mask, encoder_hidden_states=image_embeds, labels=labels
        )
        parts = BlipIntermediateOutput(image_embeds=image_embeds, decoder_output=output, decoder_labels=labels)
        return BlipOutput(loss=output.loss, loss_lm=output.loss, intermediate_output=parts)

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float | None = None,
        num_captions: int = 1,
        prompt: str | Sequence[str] | None = None,
        length_penalty: float = 1.0,
        temperature: float = 1.0,
        top_k: int = 50,
        generator: torch.Generator | None = None,
    ) -> list[str]:
        """Caption each picture of the samples, `num_captions` times.

        Args:
            samples: with `image`, and maybe `prompt`.
            use_nucleus_sampling: draw, instead of searching with beams; `num_beams` counts for beams only, `top_p`,
                `top_k` and `temperature` for drawing only.
            num_beams: any number; 1 is greedy.
            max_length: of the ids, the prompt's (4 of "a picture of ") counted.
            min_length: as `max_length`.
            top_p: share of the nucleus.
            repetition_penalty: None is 1.0 with beams and 1.1 in drawing, which LAVIS takes whatever is asked.
            num_captions: captions of each picture, one after the other; beams give the same one.
            prompt: what captions begin with, one for all or one a picture; None: of the samples, else the model's.
            length_penalty: exponent of a beam's length, which divides its score; above 1 longer captions win.
            temperature: below 1 likelier, above 1 more varied.
            top_k: the most tokens to draw from; 0 is all.
            generator: source of random numbers; None: torch's own.

        Raises:
            ConfigError: a wrong option, or a prompt that fills `max_length`.
        """
        if repetition_penalty is None:
            repetition_penalty = NUCLEUS_PENALTY if use_nucleus_sampling else 1.0
        if isinstance(num_captions, bool) or not isinstance(num_captions, int) or num_captions < 1:
            raise ConfigError(f"num_captions is {shown(num_captions)} and must be a whole number above 0.")
        rules = self._rules(
            max_length=max_length,
            min_length=min_length,
            num_beams=1 if use_nucleus_sampling else num_beams,
            length_penalty=length_penalty,
            repetition_penalty=repetition_penalty,
            do_sample=use_nucleus_sampling,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
        )
        states = self.image_states(samples)
        prompts = self._prompts(samples.get("prompt") if prompt is None else prompt, len(states))
        if use_nucleus_sampling:
            states = states.repeat_interleave(num_captions, 0)
            return self._continue([text for text in prompts for _ in range(num_captions)], states, rules, generator)
        captions = self._continue(prompts, states, rules, generator)
        return [caption for caption in captions for _ in range(num_captions)]

    def _prompts(self, prompt: str | Sequence[str] | None, count: int) -> list[str]:
        if prompt is None or isinstance(prompt, str):
            return [self.prompt if prompt is None else prompt] * count
        if len(prompt) != count:
            raise PromptError(f"{len(prompt)} prompts and {count} images: give one prompt, or one for each image.")
        return list(prompt)

    def _continue(
        self, prompts: Sequence[str], states: torch.Tensor, rules: Rules, generator: torch.Generator | None
    ) -> list[str]:
        """Caption with prompts, those of one length together; the text is cut after as many characters as the prompt.

        LAVIS's cut: where the first piece glues to the prompt's last word, it loses that piece's first letter.
        """
        ids = [self.processor.prompt_ids(prompt) for prompt in prompts]
        captions = [""] * len(prompts)
        for length in sorted({len(row) for row in ids}):
            rows = [index for index, row in enumerate(ids) if len(row) == length]
            prompt_ids = torch.tensor([ids[index] for index in rows], device=self.device)
            found = generate(self.network.text_decoder, prompt_ids, states[rows], None, rules, generator)
            for index, text in zip(rows, self.processor.decode(found), strict=True):
                captions[index] = text[len(prompts[index]) :]
        return captions


class BlipVQA(BlipBase):
    """Visual question answering."""

    arch = "blip_vqa"
    PRETRAINED_MODEL_CONFIG_DICT = {
        "vqav2": "configs/models/blip_vqa_vqav2.yaml",
        "okvqa": "configs/models/blip_vqa_okvqa.yaml",
        "aokvqa": "configs/models/blip_vqa_aokvqa.yaml",
    }

    def forward(self, samples: Mapping[str, Any]) -> BlipOutput:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Give the loss of answers: each one's summed loss times its weight, over the number of questions.

        `answer` holds the answers of all questions one after the other, `n_answers` how many each question has, and
        `weight` the share of annotators that gave each; numbers may be tensors or lists.
        """
        image_embeds, states, mask = self._read(samples)
        counts = torch.as_tensor(part(samples, "n_answers"), device=self.device)
        answers, weight = list(part(samples, "answer")), torch.as_tensor(part(samples, "weight"), device=self.device)
        if len(counts) != len(states) or int(counts.sum()) != len(answers) or weight.shape != (len(answers),):
            raise DataError(
                f"{len(states)} questions, n_answers {counts.tolist()}, {len(answers)} answers and {weight.numel()} "
                "weights: n_answers has a number for each question, and they add up to the answers and the weights."
            )
        input_ids, attention_mask = self._moved(self.processor.answers(answers))
        labels = input_ids.masked_fill(attention_mask == 0, IGNORE_INDEX)
        losses, logits = answer_losses(
            self.network.text_decoder,
            input_ids,
            attention_mask,
            states.repeat_interleave(counts, 0),
            mask.repeat_interleave(counts, 0),
        )
        loss = (weight.to(losses.dtype) * losses).sum() / len(states)
        parts = BlipIntermediateOutput(
            image_embeds=image_embeds, encoder_output=states, decoder_output=logits, decoder_labels=labels
        )
        return BlipOutput(loss=loss, loss_lm=loss, intermediate_output=parts)

    @torch.no_grad()
    def predict_answers(
        self,
        samples: Mapping[str, Any],
        num_beams: int = 3,
        inference_method: str = "rank",
        max_len: int = 10,
        min_len: int = 1,
        num_ans_candidates: int = 128,
        answer_list: Sequence[str] | None = None,
        prompt: str = "",
        compat: str | None = None,
    ) -> list[str]:
        """Answer the question of each picture.

        Args:
            samples: with `image` and `text_input`, one question for each picture; a single one may be a string.
            num_beams: of "generate"; any number, 1 is greedy.
            inference_method: "generate" writes an answer, "rank" takes the likeliest of `answer_list`.
            max_len: most ids of an answer, the first one (`[DEC]`) counted.
            min_len: least ids.
            num_ans_candidates: how many answers, the best by their first token, are scored as a whole.
            answer_list: the answers to choose from.
            prompt: a text with `{}` in the place of the question.
            compat: "lavis" attends the padding of a question in "generate", as the release does, so that an answer
                depends on the other questions of its batch.

        Raises:
            ConfigError: a wrong option, or "rank" without answers.
            DataError: another number of questions than of pictures.
        """
        if inference_method not in ("rank", "generate"):
            raise ConfigError(
                f"inference_method is {shown(inference_method)}; it is 'rank' or 'generate'."
                f"{did_you_mean(str(inference_method), ('rank', 'generate'))}"
            )
        if compat not in (None, "lavis"):
            raise ConfigError(f"compat={shown(compat)} is unknown; use None or 'lavis'.")
        if inference_method == "rank":
            candidates, scores = self.rank_answers(samples, answer_list, num_ans_candidates, prompt)
            best = candidates.gather(1, scores.argmax(1, keepdim=True))[:, 0].tolist()
            return [list(answer_list or ())[index] for index in best]
        _, states, mask = self._read(samples, prompt)
        rules = self._rules(max_length=max_len, min_length=min_len, num_beams=num_beams)
        first = self.processor.tokenizer.convert_tokens_to_ids(DECODE_TOKEN)
        prompt_ids = torch.full((len(states), 1), int(str(first)), device=self.device)
        found = generate(self.network.text_decoder, prompt_ids, states, None if compat == "lavis" else mask, rules)
        return self.processor.decode(found)

    @torch.no_grad()
    def rank_answers(
        self,
        samples: Mapping[str, Any],
        answer_list: Sequence[str] | None,
        num_ans_candidates: int = 128,
        prompt: str = "",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the answers whose first token is likeliest.

        Gives their places in `answer_list` and their scores, minus the summed label-smoothed loss of the whole answer:
        both (questions, candidates), likeliest first token first.
        """
        if not answer_list or isinstance(answer_list, str):
            raise ConfigError("inference_method='rank' chooses among answers: give answer_list=['yes', 'no', ...].")
        if isinstance(num_ans_candidates, bool) or not isinstance(num_ans_candidates, int) or num_ans_candidates < 1:
            raise ConfigError(f"num_ans_candidates is {shown(num_ans_candidates)} and must be a whole number above 0.")
        _, states, mask = self._read(samples, prompt)
        input_ids, attention_mask = self._moved(self.processor.answers(list(answer_list)))
        count = min(num_ans_candidates, len(answer_list))
        probabilities = self.first_token_logits(states, mask).softmax(-1)
        _, places = probabilities[:, input_ids[:, 1]].topk(count, dim=1)  # (questions, candidates)
        scores = []
        for question, rows in enumerate(places):
            losses, _ = answer_losses(
                self.network.text_decoder,
                input_ids[rows],
                attention_mask[rows],
                states[question].expand(count, -1, -1),
                mask[question].expand(count, -1),
            )
            scores.append(-losses)
        return places, torch.stack(scores)

    def first_token_logits(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Give the logits of an answer's first token: (questions, vocabulary)."""
        text = self.network.config.text_config
        start = torch.full((len(states), 1), text.bos_token_id, device=self.device)
        output = self.network.text_decoder(
            input_ids=start, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
        )
        return output.logits[:, 0]

    def _read(self, samples: Mapping[str, Any], prompt: str = "") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Read the questions with their pictures: image states, question states, and the questions' mask."""
        image_embeds = self.image_states(samples)
        questions = self._texts(samples, len(image_embeds))
        if prompt:
            questions = [prompt.format(question) for question in questions]
        input_ids, attention_mask = self._moved(self.processor.questions(questions))
        return image_embeds, self.network.question_states(image_embeds, input_ids, attention_mask), attention_mask


class BlipFeatureExtractor(BlipBase):
    """Features of pictures, of texts, and of both together."""

    arch = "blip_feature_extractor"
    PRETRAINED_MODEL_CONFIG_DICT = {"base": "configs/models/blip_feature_extractor_base.yaml"}

    @torch.no_grad()
    def extract_features(self, samples: Mapping[str, Any], mode: str = "multimodal") -> BlipOutputFeatures:
        """Give the features of one mode.

        "image": `image_embeds`, `image_embeds_proj`; "text": `text_embeds`, `text_embeds_proj`; "multimodal":
        `image_embeds`, `multimodal_embeds`. Position 0 stands for the whole picture or text. A text of more ids than
        the network has positions is cut, and a warning is logged.

        Raises:
            ConfigError: another mode.
            DataError: a picture or text is absent, or their numbers differ.
        """
        if mode == "image":
            image_embeds = self.image_states(samples)
            return BlipOutputFeatures(
                image_embeds=image_embeds, image_embeds_proj=F.normalize(self.network.vision_proj(image_embeds), dim=-1)
            )
        if mode == "text":
            text_embeds = self.network.text_states(*self._encode(self._texts(samples, None), None))
            return BlipOutputFeatures(
                text_embeds=text_embeds, text_embeds_proj=F.normalize(self.network.text_proj(text_embeds), dim=-1)
            )
        if mode != "multimodal":
            modes = ("image", "text", "multimodal")
            raise ConfigError(
                f"mode is {shown(mode)}; it is one of {', '.join(modes)}.{did_you_mean(str(mode), modes)}"
            )
        image_embeds = self.image_states(samples)
        texts = self._texts(samples, len(image_embeds))
        states = self.network.text_states(*self._encode(texts, ENCODE_TOKEN), image_embeds)
        return BlipOutputFeatures(image_embeds=image_embeds, multimodal_embeds=states)

    @torch.no_grad()
    def similarity(self, samples: Mapping[str, Any]) -> torch.Tensor:
        """Give the cosine of each picture and each text, (images, texts), without the temperature of training."""
        images = self.extract_features(samples, "image").image_embeds_proj
        texts = self.extract_features(samples, "text").text_embeds_proj
        assert images is not None and texts is not None  # noqa: PT018 - by the modes
        return images[:, 0] @ texts[:, 0].T

    @torch.no_grad()
    def match(self, samples: Mapping[str, Any]) -> torch.Tensor:
        """Give the probability that each text belongs to its picture: (batch,).

        Raises:
            ConfigError: the file has no matching head; pretrained and retrieval files have one.
        """
        if self.network.itm_head is None:
            raise ConfigError("These weights have no itm_head; matching needs a pretrained or retrieval file of BLIP.")
        states = self.extract_features(samples, "multimodal").multimodal_embeds
        assert states is not None  # by the mode
        return self.network.itm_head(states[:, 0]).softmax(-1)[:, 1]

    def _encode(self, texts: Sequence[str], first_token: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        positions = self.network.config.text_config.max_position_embeddings
        input_ids, attention_mask = self.processor.encode(texts, first_token, positions)
        if input_ids.shape[1] == positions and int(attention_mask[:, -1].max()) == 1:
            logger.warning("a text fills all %d positions of the network; what went beyond them was cut", positions)
        return self._moved((input_ids, attention_mask))


MODELS = {ARCHITECTURES[cls.arch]: cls for cls in (BlipCaption, BlipVQA, BlipFeatureExtractor)}
"""transformers' name of an architecture -> the registered model."""


def open_model(
    checkpoint: str | Path,
    *,
    config: Any = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> BlipBase:
    """Load whichever of the three models a LAVIS file or transformers folder is, ready to be asked.

    Args:
        checkpoint: a `.pth` file, a folder that holds one, a URL, or a transformers folder of BLIP.
        config: as `BlipBase.from_pretrained`, and so are the others.
        tokenizer: folder or hub id of bert-base-uncased, or a tokenizer.
        dtype: of the weights.
        device: of the weights.

    Raises:
        UnknownLayout: a transformers folder of another model.
        CheckpointError, ConfigError: as `BlipBase.from_pretrained`; or the file is of no BLIP.
    """
    path = local_file(checkpoint)
    cls, model_type = _told(path)
    model = cls.from_pretrained(
        model_type,
        checkpoint=path,
        config=config,
        tokenizer=tokenizer,
        dtype=dtype,
        device=device,
    )
    return model.eval()


def outline(path: Path | None, layout: Mapping[str, Any], config: Any = None) -> Any:
    """Give a path's network on the meta device, its tensors (None without a path) and the rules between them.

    Args:
        path: as `open_model`, on this machine; None: the network of `layout`.
        layout: a model type's YAML.
        config: as `open_model`.

    Raises: as `open_model`, before the first weight is read.
    """
    if path is None:
        section = dict(layout["model"])
        cls = next(cls for cls in MODELS.values() if cls.arch == section["arch"])
    else:
        cls, model_type = _told(path)
        section = model_section(cls.default_config_path(model_type))
    return opening.outline(path, ARCHITECTURES[cls.arch], cls._wanted(section, read_fields(config)))


def processor_of(path: Path, config: Any, tokenizer: str | Path | None) -> BlipProcessor | None:
    """Give the processor of a path, without its weights; None: no tokenizer lies beside it, and none was named.

    Raises:
        CheckpointError: a tokenizer that is damaged or of another model.
    """
    cls, model_type = _told(path)
    place = tokenizer or find_tokenizer(config_folder(path) if path.is_dir() or deepspeed.is_run(path) else path.parent)
    if place is None:
        return None
    section = model_section(cls.default_config_path(model_type))
    texts = {name: section[name] for name in ("prompt", "max_txt_len") if name in section}
    return BlipProcessor.from_config(config, load_tokenizer(place), **texts)


def _told(path: Path) -> tuple[Any, str]:
    """Give the registered model that a path holds, and the model type whose YAML knows its sizes."""
    architecture, width = tell(path)
    types = MODELS[architecture].PRETRAINED_MODEL_CONFIG_DICT
    is_large = width == LARGE_WIDTH and "large_coco" in types
    return MODELS[architecture], "large_coco" if is_large else next(iter(types))
