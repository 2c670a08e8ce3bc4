"""Which token is where: CogVLM's rules for positions and experts, and the plan of one forward made from them.

Apart from model.py because nothing here has weights, and the processor's and the trainer's side need the rules too.
Source: THUDM/cogvlm2-llama3-chat-19B, modeling_cogvlm.py, get_expert_mask and build_position_ids.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lavish.common.errors import PromptError
from lavish.models.cogvlm.config import CogVLMConfig


def vision_expert_mask(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Say which tokens the image expert takes: those of type 1 whose successor has type 1.

    Trap: eoi, the last row of an image, goes to the language expert, because the mask looks one token ahead.
    Shapes: (batch, seq) -> (batch, seq), bool.
    """
    is_image = token_type_ids == 1
    successor = F.pad(is_image[:, 1:], (0, 1), value=False)
    return is_image & successor


def position_ids_from(token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Give the rotary positions: bos 0, boi 1, all patches 2, eoi 3, the text after it 4, 5, ...

    Counted on the row without its padding: left padding does not shift it (the release starts at 1 there), and an
    image that ends a right-padded row keeps eoi at 3 (the release has 2). Padding gets the position before it, or 0.

    Shapes: (batch, seq) -> (batch, seq), int64.
    """
    is_real = torch.ones_like(token_type_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    is_image = (token_type_ids == 1) & is_real
    before, after = F.pad(is_image[:, :-1], (1, 0), value=False), F.pad(is_image[:, 1:], (0, 1), value=False)
    is_inner = is_image & before & after  # boi and eoi are edges and count as text
    follows_inner = F.pad(is_inner[:, :-1], (1, 0), value=False)
    is_step = is_real & ~(is_inner & follows_inner)
    return (is_step.long().cumsum(dim=1) - 1).clamp(min=0)


@dataclass(frozen=True)
class ExpertRouting:
    """How a batch splits into a language and a vision stream: made once a forward, shared by all layers.

    Text only: the stream is the batch, flattened. Image runs at the same place in all rows: `segment` (start, stop)
    cuts the time axis. Otherwise: indices into the flattened batch, and `inverse`, which restores its order.
    """

    segment: tuple[int, int] | None = None
    language_index: torch.Tensor | None = None
    vision_index: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    @classmethod
    def text_only(cls) -> "ExpertRouting":
        """Everything through the language expert; looks at no mask. What a decoding step uses."""
        return cls()

    @classmethod
    def from_token_type_ids(
        cls, token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> "ExpertRouting":
        """Read the token types, once, on the host. (batch, seq), 1 on the image slots; padding is never one."""
        is_vision = vision_expert_mask(token_type_ids if attention_mask is None else token_type_ids * attention_mask)
        is_vision_host = is_vision.cpu()
        columns = is_vision_host[0].nonzero().flatten().tolist() if len(is_vision_host) else []
        if bool((is_vision_host == is_vision_host[:1]).all()):
            if not columns:
                return cls.text_only()
            start, stop = columns[0], columns[-1] + 1
            if len(columns) == stop - start:
                return cls(segment=(start, stop))
        flat = is_vision_host.flatten()
        language, vision = (~flat).nonzero().flatten(), flat.nonzero().flatten()
        inverse = torch.cat((language, vision)).argsort()
        return cls(None, *(index.to(token_type_ids.device) for index in (language, vision, inverse)))

    def to(self, device) -> "ExpertRouting":
        """The same routing with its indices on `device` (the layers of one network may live on several)."""
        if self.language_index is None or self.vision_index is None or self.inverse is None:
            return self
        if self.inverse.device == torch.device(device):
            return self
        return ExpertRouting(
            None, self.language_index.to(device), self.vision_index.to(device), self.inverse.to(device)
        )

    def split(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Cut a (batch, seq, ...) tensor into its language and vision streams, each (tokens, features)."""
        rows, seq = batch.shape[:2]
        if self.segment is not None:
            start, stop = self.segment
            stream = batch.transpose(0, 1).reshape(seq * rows, -1)  # time first: contiguous cuts whatever the batch
            before, vision, after = stream.split((start * rows, (stop - start) * rows, (seq - stop) * rows))
            return torch.cat((before, after)), vision
        stream = batch.reshape(rows * seq, batch.shape[2:].numel())  # -1 is ambiguous where there are no tokens
        if self.language_index is None or self.vision_index is None:
            return stream, None
        return stream.index_select(0, self.language_index), stream.index_select(0, self.vision_index)

    def merge(self, language: torch.Tensor, vision: torch.Tensor | None, rows: int) -> torch.Tensor:
        """Undo `split`: two streams into (batch, seq, features)."""
        if vision is None:
            return language.view(rows, -1, language.shape[-1])
        if self.inverse is not None:
            return torch.cat((language, vision)).index_select(0, self.inverse).view(rows, -1, language.shape[-1])
        start = self.segment[0] * rows if self.segment is not None else 0
        before, after = language.split((start, language.shape[0] - start))
        stream = torch.cat((before, vision, after))
        return stream.view(-1, rows, stream.shape[-1]).transpose(0, 1)

    def last(self, language: torch.Tensor, rows: int) -> torch.Tensor:
        """Take the last column out of the language stream, (batch, features): a last token is always one of it."""
        if self.inverse is not None:
            return language.index_select(0, self.inverse.view(rows, -1)[:, -1])
        if self.segment is not None:
            return language[-rows:]
        return language.view(rows, -1, language.shape[-1])[:, -1]


@dataclass(frozen=True)
class ForwardPlan:
    """What one forward knows about its tokens."""

    position_ids: torch.Tensor  # (batch, seq)
    routing: ExpertRouting
    rope_deltas: torch.Tensor  # (batch, 1), cache slots so far minus the next position
    is_prefill: bool = False
    is_unpadded: bool = False  # causality alone hides every padded key
    is_image_slot: torch.Tensor | None = None  # (batch, seq), bool
    num_images: int = 0  # of CogVLM2-Video: frames
    has_new_image: bool = False


def decode_plan(tokens: torch.Tensor, past, rope_deltas: torch.Tensor | None) -> ForwardPlan:
    """Plan one new token a row: text, at the next position. Looks at no mask and does not wait for the device."""
    if rope_deltas is None:
        rope_deltas = torch.zeros(tokens.shape[0], 1, dtype=torch.long, device=tokens.device)
    elif rope_deltas.shape[0] != tokens.shape[0]:
        raise PromptError(
            f"{tokens.shape[0]} rows were given and the cache holds the positions of {rope_deltas.shape[0]}. "
            "Pass the rope_deltas of the rows, repeated or selected like the cache."
        )
    elif isinstance(past, int) and past == 0:
        rope_deltas = torch.zeros_like(rope_deltas)  # a cache that was reset
    return ForwardPlan(past - rope_deltas, ExpertRouting.text_only(), rope_deltas)


def prefill_plan(
    config: CogVLMConfig,
    tokens: torch.Tensor,
    past: int,
    rope_deltas: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> ForwardPlan:
    """Plan a prompt, or several tokens after a cached prefix. Reads types and mask on the host, once.

    Raises: PromptError if shapes do not fit, or image slots are not one run of `num_image_tokens` in a row.
    """
    rows, seq = tokens.shape[:2]
    if token_type_ids is None:
        token_type_ids = torch.zeros(rows, seq, dtype=torch.long, device=tokens.device)
    mask, is_mask_2d = attention_mask, attention_mask is not None and attention_mask.ndim == 2
    if mask is None or not is_mask_2d:
        mask = torch.ones(rows, past + seq, dtype=torch.long, device=tokens.device)
    _check_shape("token_type_ids", token_type_ids, rows, seq, past, allowed=((rows, seq), (rows, past + seq)))
    _check_shape("attention_mask", mask, rows, seq, past, allowed=((rows, past + seq),))

    is_real, is_whole = mask != 0, token_type_ids.shape[1] == past + seq
    types = token_type_ids * (is_real if is_whole else is_real[:, past:])
    types_host, real_host = torch.stack((F.pad(types, (past + seq - types.shape[1], 0)), is_real.to(types.dtype))).cpu()
    num_images = _count_images(types_host, config)
    has_new_image = bool(types_host[:, past:].any())
    if has_new_image and past:
        _check_cut(types_host, past, config.is_video)
    if is_whole:
        position_ids = position_ids_from(types, is_real)[:, past:]
    else:
        start = past if rope_deltas is None else past - rope_deltas
        position_ids = position_ids_from(types, is_real[:, past:]) + start
    types = types[:, -seq:]
    return ForwardPlan(
        position_ids,
        ExpertRouting.from_token_type_ids(types)
        if has_new_image and not config.is_video
        else ExpertRouting.text_only(),
        rope_deltas=past + seq - 1 - position_ids[:, -1:],
        is_prefill=True,
        is_unpadded=is_mask_2d and _causality_hides_padding(real_host, past),
        is_image_slot=types == 1,
        num_images=num_images,
        has_new_image=has_new_image,
    )


def _check_cut(types_host: torch.Tensor, past: int, is_video: bool) -> None:
    """Refuse a cache that ends where no prompt can go on: inside an image, or between the frames of a video."""
    if bool((types_host[:, past - 1] * types_host[:, past]).any()):
        raise PromptError(f"the cache ends inside an image, after {past} tokens. Crop it before the image or after it.")
    if is_video and bool(types_host[:, :past].any()):
        raise PromptError(f"the cache ends between the frames of a video, after {past} tokens. Crop it before them.")


def _check_shape(name: str, tensor: torch.Tensor, rows: int, seq: int, past: int, allowed) -> None:
    if tuple(tensor.shape) not in allowed:
        raise PromptError(
            f"{name} has the shape {tuple(tensor.shape)}; {seq} tokens in {rows} rows after {past} cached ones take "
            f"{' or '.join(map(str, sorted(set(allowed))))}."
        )


def _causality_hides_padding(real_host: torch.Tensor, past: int) -> bool:
    """Whether no padded column stands before a real one; with a cache: whether there is no padding at all."""
    if past:
        return bool(real_host.all())
    return bool((real_host[:, 1:] <= real_host[:, :-1]).all())


def _count_images(types_host: torch.Tensor, config: CogVLMConfig) -> int:
    """Count the images; a row may have one run of slots, of the length that the tower gives. Frames of a video may be
    several in a row, with text between them or without.
    """
    is_image, num_image_tokens = types_host == 1, config.num_image_tokens
    if config.is_video:
        return _count_frames(is_image, config)
    runs = (is_image & ~F.pad(is_image[:, :-1], (1, 0), value=False)).sum(dim=1).tolist()
    slots = is_image.sum(dim=1).tolist()
    for row, (num_runs, num_slots) in enumerate(zip(runs, slots, strict=True)):
        if num_runs > 1:
            raise PromptError(
                f"row {row} has {num_runs} images (runs of token_type_ids 1); this family takes at most one image in a "
                "conversation."
            )
        if num_runs and num_slots != num_image_tokens:
            raise PromptError(
                f"row {row} has {num_slots} image slots (token_type_ids 1); an image of this model takes "
                f"{num_image_tokens}: boi, {num_image_tokens - 2} patches, eoi. Make the inputs with the processor "
                "of the same checkpoint."
            )
    return sum(1 for num_runs in runs if num_runs)


def _count_frames(is_image: torch.Tensor, config: CogVLMConfig) -> int:
    for row, slots in enumerate(is_image.sum(dim=1).tolist()):
        frames, torn = divmod(slots, config.num_image_tokens)
        if torn:
            raise PromptError(
                f"row {row} has {slots} image slots (token_type_ids 1); a frame of this model takes "
                f"{config.num_image_tokens}: boi, {config.num_image_tokens - 2} patches, eoi. Make the inputs with the "
                "processor of the same checkpoint."
            )
        if frames > (config.max_frames or 0):
            raise PromptError(f"row {row} has {frames} frames; a video has {config.max_frames} at most (max_frames).")
    return int(is_image.sum()) // config.num_image_tokens
