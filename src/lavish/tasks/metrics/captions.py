"""BLEU-1 to 4, ROUGE-L and CIDEr-D of captions, as COCO's evaluation counts them.

Texts are lists of words (`ptb.tokenize`). Every function takes one prediction a picture and its references. Sources of
the numbers (rules, no code): Papineni et al. 2002 (BLEU), Lin 2004 (ROUGE-L, beta 1.2), Vedantam et al. 2015 (CIDEr-D,
sigma 6), with the constants of salaniz/pycocoevalcap, bleu/bleu_scorer.py, rouge/rouge.py and cider/cider_scorer.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from lavish.tasks.metrics.measure import MAX_N, Measure, mean_of

Words = Sequence[str]
ROUGE_BETA = 1.2
CIDER_SIGMA = 6.0


def ngrams(words: Words, max_n: int = MAX_N) -> Counter[tuple[str, ...]]:
    """Count the n-grams of 1 to `max_n` words."""
    return Counter(tuple(words[start : start + n]) for n in range(1, max_n + 1) for start in range(len(words) - n + 1))


def bleu(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> dict[str, Measure]:
    """Give Bleu_1 to Bleu_4 of the whole set: clipped precisions, and a penalty by the closest reference lengths."""
    stats = np.array([_bleu_counts(words, refs) for words, refs in zip(predictions, references, strict=True)])
    return {f"Bleu_{n}": Measure(stats, f"bleu_{n}") for n in range(1, MAX_N + 1)}


def _bleu_counts(words: Words, refs: Sequence[Words]) -> list[float]:
    """Give length, closest reference length, then right and all n-grams of each n."""
    counts = ngrams(words)
    most: Counter[tuple[str, ...]] = Counter()
    for ref in refs:
        most |= ngrams(ref)
    right = [0] * MAX_N
    for gram, count in counts.items():
        right[len(gram) - 1] += min(most[gram], count)
    closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
    return [len(words), closest, *right, *(max(0, len(words) - n) for n in range(MAX_N))]


def rouge_l(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Measure:
    """Give the mean ROUGE-L: the best recall and the best precision over a picture's references, put together."""
    return mean_of([_rouge(words, refs) for words, refs in zip(predictions, references, strict=True)])


def _rouge(words: Words, refs: Sequence[Words]) -> float:
    common = [common_subsequence(words, ref) for ref in refs]
    precision = max(common) / max(len(words), 1)
    recall = max(length / max(len(ref), 1) for length, ref in zip(common, refs, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def common_subsequence(first: Words, second: Words) -> int:
    """Give the length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for place, other in enumerate(second, 1):
            diagonal, row[place] = row[place], diagonal + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


def cider(predictions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Measure:
    """Give the mean CIDEr-D.

    How rare an n-gram is comes from the references of all pictures, so a subset of the pictures gives other numbers,
    and a single picture gives 0: every n-gram of its references is in all of one picture.
    """
    frequency: Counter[tuple[str, ...]] = Counter()
    counted = [[ngrams(ref) for ref in refs] for refs in references]
    for refs in counted:
        frequency.update({gram for ref in refs for gram in ref})
    weights = _Rarity(frequency, len(references))
    scores = [
        float(np.mean([weights.similarity(ngrams(words), ref) for ref in refs]))
        for words, refs in zip(predictions, counted, strict=True)
    ]
    return mean_of(scores)


class _Rarity:
    """Weighs n-grams by how many pictures' references hold them."""

    def __init__(self, frequency: Counter[tuple[str, ...]], num_pictures: int) -> None:
        self.frequency, self.log_num = frequency, float(np.log(max(num_pictures, 1)))

    def vectors(self, counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Give the weighted counts of each n, their lengths as vectors, and the number of word pairs."""
        rows: list[dict[tuple[str, ...], float]] = [{} for _ in range(MAX_N)]
        for gram, count in counts.items():
            rarity = self.log_num - float(np.log(max(1, self.frequency[gram])))
            rows[len(gram) - 1][gram] = count * rarity
        lengths = [sum(value**2 for value in row.values()) ** 0.5 for row in rows]
        # The released scorer takes the number of pairs for the caption's length in the penalty.
        return rows, lengths, sum(count for gram, count in counts.items() if len(gram) == 2)

    def similarity(self, counts: Counter[tuple[str, ...]], ref: Counter[tuple[str, ...]]) -> float:
        """Give the clipped cosine of two captions, mean over n, times ten, with the penalty on their lengths."""
        rows, lengths, num = self.vectors(counts)
        ref_rows, ref_lengths, ref_num = self.vectors(ref)
        total = 0.0
        for row, ref_row, length, ref_length in zip(rows, ref_rows, lengths, ref_lengths, strict=True):
            shared = sum(min(value, ref_row[gram]) * ref_row[gram] for gram, value in row.items() if gram in ref_row)
            if length and ref_length:
                total += shared / (length * ref_length)
        return 10 * total / MAX_N * float(np.exp(-((num - ref_num) ** 2) / (2 * CIDER_SIGMA**2)))
