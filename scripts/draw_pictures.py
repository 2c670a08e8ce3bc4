"""Draw the pictures bundled with the pocket model anew: scenes of its own world that it was not trained on."""

from pathlib import Path

import numpy as np

from lavish.datasets.scenes.world import draw, sample_scene

FOLDER = Path(__file__).resolve().parent.parent / "src" / "lavish" / "pocket" / "pictures"
SEEDS = {"star-square-circle.png": 26515, "circle-triangle-square.png": 28497, "triangle-square-heart.png": 16351}
SIZE = 448


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, seed in SEEDS.items():
        scene = sample_scene(np.random.default_rng([2026, seed]))
        draw(scene, SIZE).save(FOLDER / name, optimize=True)
        shapes = ", ".join(f"{item.size} {item.colour} {item.shape} {item.box}" for item in scene.items)
        print(f"{name}: number {scene.number.text if scene.number else 'none'}; {shapes}")


if __name__ == "__main__":
    main()
