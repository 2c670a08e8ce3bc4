"""Pictures by texts and texts by pictures. Source: salesforce/LAVIS, lavis/tasks/retrieval.py and
lavis/models/blip_models/blip.py, compute_sim_matrix.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from lavish.common import dist
from lavish.common.errors import ConfigError, DataError
from lavish.models.blip.samples import BlipFeatureExtractor
from lavish.tasks.base_task import to_device
from lavish.tasks.metrics.measure import Measure, mean_of
from lavish.tasks.metrics.retrieval import ranks, recalls
from lavish.tasks.scored_task import ScoredTask, Scores

TEXTS_AT_ONCE = 256
NOT_RANKED = -100.0
"""Score of a pair that was not among the `k_test` best, as in LAVIS: below every pair that was."""


class RetrievalTask(ScoredTask):
    """`retrieval`: recalls in percent; `agg_metrics` is the mean of those of texts.

    The data set has `text`, `image`, `txt2img` and `img2txt`; its samples have `image` and `index`. A model of one's
    own gives the two matrices by `compute_sim_matrix(data_loader, task_cfg=run)`. A feature extractor is compared by
    its projected features, and where it has a matching head the `run.k_test` best of each query are ranked anew.
    """

    @torch.no_grad()
    def evaluation(self, model: nn.Module, data_loader: Iterable[Any], cuda_enabled: bool | None = None) -> list[Any]:
        """Give the scores of all pairs, texts of each picture and pictures of each text, as one result.

        The batches of all processes together are each picture once.

        Raises:
            ConfigError: a model that gives no features.
        """
        compute = getattr(model, "compute_sim_matrix", None)  # LAVIS's retrieval models have it
        if compute is not None:
            by_image, by_text = compute(data_loader, task_cfg=self.run)
            return [{"by_image": np.asarray(by_image), "by_text": np.asarray(by_text)}] if dist.is_main() else []
        if not isinstance(model, BlipFeatureExtractor):
            raise ConfigError(
                f"{type(model).__name__} gives no features to compare; use blip_feature_extractor, or give the model a "
                "method compute_sim_matrix(data_loader, task_cfg)."
            )
        return self._compare(model, data_loader)

    def _compare(self, model: BlipFeatureExtractor, data_loader: Iterable[Any]) -> list[Any]:
        pixels, vectors = {}, {}
        for samples in data_loader:
            batch = to_device(samples, model.device)
            found = model.extract_features(batch, "image").image_embeds_proj
            assert found is not None  # by the mode
            for index, image, vector in zip(batch["index"], batch["image"], found[:, 0], strict=True):
                pixels[int(index)], vectors[int(index)] = image, vector.cpu()
        together = {index: vector for part in dist.gather(vectors) for index, vector in part.items()}
        texts = list(self.dataset.text)
        if sorted(together) != list(range(len(self.dataset))):
            raise DataError(f"{len(together)} of {len(self.dataset)} pictures were compared.")
        images = torch.stack([together[index] for index in range(len(together))])
        words = torch.cat(
            [
                model.extract_features({"text_input": texts[at : at + TEXTS_AT_ONCE]}, "text")
                .text_embeds_proj[:, 0]  # pyright: ignore[reportOptionalSubscript] - there by the mode
                .cpu()
                for at in range(0, len(texts), TEXTS_AT_ONCE)
            ]
        )
        similar = images @ words.T  # (images, texts)
        depth = self.option("k_test", 0)
        if not depth or model.network.itm_head is None:
            return [{"by_image": similar.numpy(), "by_text": similar.T.numpy()}] if dist.is_main() else []
        return self._rank_anew(model, pixels, texts, similar, depth)

    def _rank_anew(
        self,
        model: BlipFeatureExtractor,
        pixels: dict[int, torch.Tensor],
        texts: list[str],
        similar: torch.Tensor,
        depth: int,
    ) -> list[Any]:
        """Score the best pairs with the matching head: its logit plus the similarity."""
        own = sorted(pixels)
        by_image = torch.full_like(similar, NOT_RANKED)
        for image in own:
            rows = similar[image].topk(min(depth, len(texts))).indices
            logits = match(model, pixels[image].expand(len(rows), -1, -1, -1), [texts[int(row)] for row in rows])
            by_image[image, rows] = logits + similar[image, rows]
        by_text = torch.full_like(similar.T, NOT_RANKED)
        for text, row in enumerate(similar.T):
            best = [int(image) for image in row.topk(min(depth, len(row))).indices if int(image) in pixels]
            if best:
                logits = match(model, torch.stack([pixels[image] for image in best]), [texts[text]] * len(best))
                by_text[text, best] = logits + row[best]
        parts = dist.gather((by_image.numpy(), by_text.numpy()))
        matrices = [np.maximum.reduce(list(part)) for part in zip(*parts, strict=True)]
        return [{"by_image": matrices[0], "by_text": matrices[1]}] if dist.is_main() else []

    def merged(self, val_result: list[Any]) -> list[Any]:
        """Give the matrices, which the main process has."""
        return val_result

    def finish_split(
        self, results: list[Any], split_name: str, epoch: Any
    ) -> tuple[Scores | None, dict[str, Any] | None]:
        """Give the recalls; matrices are not written."""
        scores = self.score(results, self.dataset, split_name)
        return scores, scores.metrics()

    def score(self, results: Any, dataset: Any, split_name: str) -> Scores:
        """Give recalls of texts (`txt_r1` ...) and of pictures (`img_r1` ...)."""
        matrices = results[0]
        measures: dict[str, Measure] = {}
        for name, scores, right in (
            ("txt", matrices["by_image"], dataset.img2txt),
            ("img", matrices["by_text"], dataset.txt2img),
        ):
            for depth, hits in recalls(ranks(np.asarray(scores), right)).items():
                measures[f"{name}_r{depth}"] = mean_of(hits, 100)
        means = {
            f"{name}_r_mean": float(np.mean([measures[f"{name}_r{depth}"].value for depth in (1, 5, 10)]))
            for name in ("txt", "img")
        }
        means["r_mean"] = sum(means.values()) / 2
        return Scores(measures, means["txt_r_mean"], values=means)


def match(model: BlipFeatureExtractor, pixels: torch.Tensor, texts: list[str]) -> torch.Tensor:
    """Give the logit that each text belongs to its picture: (batch,)."""
    states = model.extract_features({"image": pixels, "text_input": texts}, "multimodal").multimodal_embeds
    assert states is not None  # by the mode
    return model.network.itm_head(states[:, 0])[:, 1].float().cpu()
