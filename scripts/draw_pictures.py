"""Draw the pictures bundled with the pocket model anew: scenes of its own world that it was not trained on.

The first one is chosen so that the questions of `make demo` are answered rightly; how often they are is in the card.
"""

from pathlib import Path

import numpy as np

from lavish.datasets.scenes.world import draw, sample_scene

FOLDER = Path(__file__).resolve().parent.parent / "src" / "lavish" / "pocket" / "pictures"
SEEDS = {  # name -> seed and most shapes
    "star-square-circle.png": (249532, 3),
    "circle-triangle-square.png": (28497, 4),
    "triangle-square-heart.png": (16351, 4),
}
SIZE = 448


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, (seed, max_items) in SEEDS.items():
        scene = sample_scene(np.random.default_rng([2026, seed]), max_items=max_items)
        draw(scene, SIZE).save(FOLDER / name, optimize=True)
        shapes = ", ".join(f"{item.size} {item.colour} {item.shape} {item.box}" for item in scene.items)
        print(f"{name}: number {scene.number.text if scene.number else 'none'}; {shapes}")


if __name__ == "__main__":
    main()
