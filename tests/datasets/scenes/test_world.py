"""The drawn world: the same seed gives the same picture, and labels and boxes say what the pixels show."""

import numpy as np
import pytest
from PIL import Image

from lavish.common.errors import DataError
from lavish.datasets.scenes import world
from lavish.datasets.scenes.world import COLOURS, GRID, PATTERNS, SHAPES, SIZES, dense_labels, draw, sample_scene


def scene_of(seed: int, **options) -> world.Scene:
    return sample_scene(np.random.default_rng(seed), **options)


def without_noise(scene: world.Scene, items=None, number=None) -> world.Scene:
    background = world.Background("plain", ((240, 240, 240), (200, 200, 200)), 8, 0, 0, 0)
    return world.Scene(scene.items if items is None else items, number, background)


def cells(box: world.Box) -> tuple[int, ...]:
    return tuple(round(edge * GRID) for edge in box)


def test_a_seed_gives_one_scene_and_one_picture():
    for seed in range(20):
        first, second = scene_of(seed), scene_of(seed)
        assert first == second
        assert draw(first).tobytes() == draw(second).tobytes()
    assert scene_of(1) != scene_of(2)


@pytest.mark.parametrize("size", [1, 56, 112, 200, 448])
def test_a_picture_has_the_size_asked_for(size):
    picture = draw(scene_of(3), size)
    assert picture.mode == "RGB"
    assert picture.size == (size, size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("diameter", [18, 22, 33, 54])
def test_the_box_is_the_extent_of_the_drawn_pixels(shape, diameter):
    height = round(diameter * world._unit_outline(shape)[1])
    box = (30 / GRID, 40 / GRID, (30 + diameter) / GRID, (40 + height) / GRID)
    item = world.Item(shape, "blue", "small", box, (36, 92, 216))
    pixels = np.asarray(draw(without_noise(scene_of(0), (item,))), dtype=int)
    touched = (pixels != 240).any(axis=2)
    rows, columns = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
    assert (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) == cells(box)


def test_what_shows_of_an_item_has_its_colour():
    for seed in range(60):
        scene = scene_of(seed)
        pixels = np.asarray(draw(without_noise(scene, number=scene.number)), dtype=int)
        owner = world.owner_map(scene)
        for index, item in enumerate(scene.items, start=1):
            inside = owner == index
            for axis in (0, 1):  # only cells whose neighbours are of the item too: the edges are blended
                inside = inside & np.roll(owner == index, 1, axis) & np.roll(owner == index, -1, axis)
            assert inside.any()
            distance = np.abs(pixels[inside] - item.rgb).max(axis=1)
            assert np.mean(distance <= 2) > 0.97


def test_every_item_stays_visible_and_items_of_one_colour_do_not_touch():
    for seed in range(200):
        scene = scene_of(seed)
        owner = world.owner_map(scene)
        for index, item in enumerate(scene.items, start=1):
            x0, y0, x1, y1 = cells(item.box)
            assert 0 <= x0 < x1 <= GRID
            assert 0 <= y0 < y1 <= GRID
            area = int(world._hard_mask(item.shape, x1 - x0, y1 - y0).sum())
            assert int((owner == index).sum()) >= 0.6 * area
            grown = np.zeros_like(owner, dtype=bool)
            for down in (-1, 0, 1):
                for across in (-1, 0, 1):
                    grown |= np.roll(owner == index, (down, across), (0, 1))
            neighbours = {int(other) for other in np.unique(owner[grown]) if other not in (0, index)}
            assert all(scene.items[other - 1].colour != item.colour for other in neighbours)


def test_the_sizes_are_clearly_apart():
    widths = {size: [] for size in SIZES}
    for seed in range(300):
        for item in scene_of(seed).items:
            widths[item.size].append(cells(item.box)[2] - cells(item.box)[0])
    assert max(widths["small"]) + 6 < min(widths["medium"])
    assert max(widths["medium"]) + 8 < min(widths["large"])


def test_colours_and_backgrounds_cannot_be_confused():
    for seed in range(200):
        scene = scene_of(seed)
        for tint in scene.background.tints:
            assert max(tint) - min(tint) <= 14
            for item in scene.items:
                assert np.abs(np.subtract(tint, item.rgb)).max() > 60
    for name, rgb in world._RGB.items():
        nearest = min(np.abs(np.subtract(rgb, other)).max() for key, other in world._RGB.items() if key != name)
        assert nearest > 4 * world._COLOUR_JITTER


def test_every_class_occurs_and_so_do_twins():
    scenes = [scene_of(seed) for seed in range(400)]
    items = [item for scene in scenes for item in scene.items]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.size for item in items} == set(SIZES)
    assert {scene.background.pattern for scene in scenes} == set(PATTERNS)
    assert {len(scene.items) for scene in scenes} == {0, 1, 2, 3, 4}
    numbers = [scene.number for scene in scenes if scene.number]
    assert 0.28 < len(numbers) / len(scenes) < 0.42
    assert {len(number.text) for number in numbers} == {1, 2, 3, 4}
    assert any(len({item.shape for item in scene.items}) < len(scene.items) for scene in scenes)
    assert any(len({item.colour for item in scene.items}) < len(scene.items) for scene in scenes)


def test_options_limit_the_scene():
    assert all(len(scene_of(seed, max_items=2).items) <= 2 for seed in range(50))
    assert scene_of(4, max_items=0).items == ()
    assert all(scene_of(seed, number_probability=1.0).number for seed in range(20))
    with pytest.raises(DataError, match="max_items=-1"):
        scene_of(0, max_items=-1)


def test_digits_are_drawn_inside_their_boxes_and_are_never_covered():
    for seed in range(40):
        scene = scene_of(seed, number_probability=1.0)
        number = scene.number
        assert number is not None
        with_digits = np.asarray(draw(without_noise(scene, number=number)), dtype=int)
        for box in number.digit_boxes:
            x0, y0, x1, y1 = cells(box)
            ink = np.abs(with_digits[y0:y1, x0:x1] - number.ink).max(axis=2) < 40
            assert ink.any(axis=1)[[0, 1, -2, -1]].sum() >= 2
            assert ink.mean() > 0.1
        x0, y0, x1, y1 = cells(number.box)
        assert (x0, x1) == (cells(number.digit_boxes[0])[0], cells(number.digit_boxes[-1])[2])
        assert not world.owner_map(scene)[y0:y1, x0:x1].any()


@pytest.mark.parametrize("grid", [8, 14, 16, 28])
def test_patch_labels_agree_with_a_count_of_cells(grid):
    side = GRID // grid
    for seed in range(15):
        scene = scene_of(seed, number_probability=0.6)
        labels, owner = dense_labels(scene, grid), world.owner_map(scene)
        for row in range(grid):
            for column in range(grid):
                patch = owner[row * side : (row + 1) * side, column * side : (column + 1) * side]
                counts = {index: int((patch == index).sum()) for index in range(1, len(scene.items) + 1)}
                best = max(counts, key=lambda index: counts[index], default=0)
                item = best if best and counts[best] * 4 >= side * side else 0
                assert labels["item"][row, column] == item
                if item:
                    of = scene.items[item - 1]
                    found = tuple(int(labels[name][row, column]) for name in ("shape", "colour", "size"))
                    assert found == (
                        SHAPES.index(of.shape) + 1,
                        COLOURS.index(of.colour) + 1,
                        SIZES.index(of.size) + 1,
                    )
                    np.testing.assert_array_equal(labels["box"][row, column], np.float32(of.box))
                else:
                    assert not labels["box"][row, column].any()


def test_digit_labels_follow_the_number_from_left_to_right():
    for seed in range(40):
        scene = scene_of(seed, number_probability=1.0)
        labels = dense_labels(scene)
        text = scene.number.text
        places = labels["digit_index"]
        read = {place: int(labels["digit"][places == place][0]) - 1 for place in set(places.ravel().tolist()) - {0}}
        assert read == {place: int(digit) for place, digit in enumerate(text, start=1)}
        shown = labels["digit_index"] > 0
        assert set(labels["number_length"][shown].tolist()) == {len(text)}
        assert not labels["number_box"][~shown].any()
        assert not labels["digit"][~shown].any()


def test_a_scene_without_items_and_number_is_labelled_empty():
    empty = scene_of(0, max_items=0, number_probability=0.0)
    labels = dense_labels(empty)
    pattern = labels.pop("background")
    assert set(pattern.ravel().tolist()) == {PATTERNS.index(empty.background.pattern)}
    assert not any(array.any() for array in labels.values())
    assert labels["box"].shape == labels["number_box"].shape == (14, 14, 4)
    assert labels["box"].dtype == np.float32


def test_a_large_drawing_shrinks_to_the_small_one():
    for seed in range(8):
        scene = scene_of(seed)
        small = np.asarray(draw(scene), dtype=float)
        shrunk = np.asarray(draw(scene, 448).resize((GRID, GRID), Image.Resampling.BOX), dtype=float)
        assert np.abs(small - shrunk).mean() < 4.0


def test_wrong_sizes_are_refused_by_name():
    with pytest.raises(DataError, match="size=0"):
        draw(scene_of(0), 0)
    with pytest.raises(DataError, match="grid=13"):
        dense_labels(scene_of(0), 13)
