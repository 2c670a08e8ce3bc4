"""Choosing the next token from logits: greedy, or temperature, top-k and top-p with one random stream a row.

The filters and their order are those of transformers' `generate` (repetition penalty, temperature, top-k, top-p).
Random numbers are drawn on the CPU, one a token and row: the same seed gives the same tokens on every device, alone or
in a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lavish.common.errors import NumericsError
from lavish.inference.options import GenerationOptions

NO_NUMBERS = (
    "the network gave NaN or infinity where the likelihoods of the next word should be, so there is no answer. Either "
    "its weights are damaged (`lavish inspect` compares the files with the config; fetch them again), or its dtype "
    "overflows: load it with dtype='bfloat16' or dtype='float32'."
)


def penalise_repetition(logits: torch.Tensor, token_ids: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divide positive and multiply negative logits of the tokens that already occurred.

    Shapes: logits (vocab), token_ids (any) -> (vocab).
    """
    score = logits[token_ids]
    return logits.scatter(0, token_ids, torch.where(score < 0, score * penalty, score / penalty))


def keep_top_k(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Set all but the k largest logits to -inf; ties with the k-th stay. Shapes: (vocab) -> (vocab)."""
    if k >= logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the smallest set of tokens whose probability reaches p, at least one. Shapes: (vocab) -> (vocab)."""
    if p >= 1.0:
        return logits
    ascending, order = logits.sort()
    remove = ascending.softmax(-1).cumsum(-1) <= 1.0 - p
    remove[-1] = False
    return logits.masked_fill(remove.scatter(0, order, remove), -torch.inf)


def likeliest(logits: torch.Tensor) -> list[int]:
    """Give the token of the largest logit of each row, with one wait for the device. Shapes: logits (rows, vocab).

    Raises:
        NumericsError: a row holds NaN or infinity, or nothing above -infinity.
    """
    best = logits.max(dim=-1)  # which gives NaN where a row holds one
    token_ids = best.indices.where(best.values.isfinite(), -1).tolist()
    if min(token_ids) < 0:
        raise NumericsError(NO_NUMBERS)
    return token_ids


class Sampler:
    """Choose the next token of ONE row. It holds the row's random stream and the ids that a repetition penalty looks
    at. `new_seed` gives the seed where the options have none; default: the system's randomness.
    """

    def __init__(self, options: GenerationOptions, prompt_ids: list[int], new_seed: Callable[[], int] | None = None):
        self.options = options
        self.is_greedy = options.is_greedy
        self._penalise = options.repetition_penalty != 1.0
        self._seen = dict.fromkeys(prompt_ids) if self._penalise else {}
        self._generator = torch.Generator()
        if options.seed is not None:
            self._generator.manual_seed(options.seed)
        elif new_seed is not None:
            self._generator.manual_seed(new_seed())
        else:
            self._generator.seed()

    @property
    def needs_only_argmax(self) -> bool:
        """True if the token is the largest logit and nothing else is looked at, so that a batch can be reduced at
        once.
        """
        return self.is_greedy and not self._penalise

    def __call__(self, logits: torch.Tensor) -> int:
        """Choose a token. Shapes: logits (vocab), any float dtype.

        Raises:
            NumericsError: the logits hold NaN or infinity.
        """
        if self._penalise:
            seen = torch.tensor(list(self._seen), dtype=torch.long, device=logits.device)
            logits = penalise_repetition(logits.float(), seen, self.options.repetition_penalty)
        token_id = likeliest(logits[None])[0] if self.is_greedy else self._draw(logits.float())
        if self._penalise:
            self._seen[token_id] = None
        return token_id

    def _draw(self, logits: torch.Tensor) -> int:
        options = self.options
        # The largest becomes 0, so that a temperature near 0 gives -inf for the others and no NaN.
        logits = (logits - logits.max()) / max(options.temperature or 1.0, torch.finfo(torch.float32).tiny)
        if options.top_k:
            logits = keep_top_k(logits, options.top_k)
        probabilities = keep_top_p(logits, options.top_p or 1.0).softmax(-1)
        cumulative = probabilities.cpu().double().cumsum(-1)  # MPS has no float64
        if not cumulative[-1].isfinite():  # one NaN or infinity makes NaN of all
            raise NumericsError(NO_NUMBERS)
        # Inside [0, total): a token of probability 0 is never hit, not by u = 0 nor by rounding at the end.
        target = cumulative[-1] * torch.rand((), generator=self._generator, dtype=torch.float64).item()
        return int((cumulative <= target).sum().clamp(max=cumulative.shape[-1] - 1))
