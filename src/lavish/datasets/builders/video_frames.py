"""How many frames of a clip a picture processor gets: `build_info.num_frames`, for all builders of videos."""

from __future__ import annotations

from typing import Any

from lavish.common.errors import ConfigError, shown
from lavish.datasets.datasets.videos import NUM_FRAMES


class VideoFrames:
    """Put before `BaseDatasetBuilder`; its datasets have the attribute `num_frames`."""

    BUILD_INFO_KEYS = ("num_frames",)

    def check(self) -> None:
        """Check the number too."""
        super().check()  # type: ignore[misc]
        count = self.num_frames
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ConfigError(f"build_info.num_frames is {shown(count)}; a whole number above 0 is expected.")

    @property
    def num_frames(self) -> Any:
        """The number of frames."""
        return self.build_info.get("num_frames", NUM_FRAMES)  # type: ignore[attr-defined]

    def build_split(self, split: str) -> Any:
        """Give the dataset of one split, which knows the number."""
        dataset = super().build_split(split)  # type: ignore[misc]
        dataset.num_frames = self.num_frames
        return dataset
