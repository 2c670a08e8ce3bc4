"""Step 6: the task. What it reports is a loss, so lower is better."""

from lavish.common.registry import registry
from lavish.tasks.base_task import BaseTask


@registry.register_task("my_dialogue")
class MyDialogueTask(BaseTask):
    """The mean loss over the held-out dialogues."""

    higher_is_better = False

    @classmethod
    def setup_task(cls, cfg):
        """Make it of a merged recipe."""
        return cls()

    def valid_step(self, model, samples):
        """Give the loss of a batch, under the id of its first sample."""
        loss = float(model(samples)["loss"])
        return [{"instance_id": samples["instance_id"][0], "loss": loss, "count": len(samples["instance_id"])}]

    def after_evaluation(self, val_result, split_name, epoch):
        """Merge what all processes found, and give the mean."""
        from lavish.tasks.results import merge_results

        found = merge_results(val_result, "instance_id")
        loss = sum(one["loss"] * one["count"] for one in found) / sum(one["count"] for one in found)
        return {"agg_metrics": loss}
