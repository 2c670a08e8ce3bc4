"""Draw features and dialogues in the form of AVSD, small enough to try the package: `python make_features.py FOLDER`.

A dialogue asks for the colour of its video, which its features tell.
"""

import json
import sys
from pathlib import Path

import numpy as np

COLORS = ("red", "green", "blue", "yellow")
WIDTHS = {"i3d_flow": 8, "i3d_rgb": 8, "vggish": 4}


def main(folder, num_videos=16):
    """Write `features/<name>/<video>.npy` and `annotations/{train,val}.json`."""
    random = np.random.default_rng(0)
    dialogs = []
    for number in range(num_videos):
        color, video = number % len(COLORS), f"video{number}"
        for name, width in WIDTHS.items():
            path = folder / "features" / name
            path.mkdir(parents=True, exist_ok=True)
            frames = 0.1 * random.standard_normal((3 + number % 3, width)) + np.eye(width)[color]
            np.save(path / f"{video}.npy", frames.astype(np.float32))
        turns = [
            {"question": "is it a video ?", "answer": "yes"},
            {"question": "what color is it ?", "answer": COLORS[color]},
        ]
        dialogs.append({"image_id": video, "caption": "a wall", "summary": "someone painted it", "dialog": turns})
    (folder / "annotations").mkdir(exist_ok=True)
    for split, part in (("train", dialogs[:-4]), ("val", dialogs[-4:])):
        (folder / "annotations" / f"{split}.json").write_text(json.dumps({"dialogs": part}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
