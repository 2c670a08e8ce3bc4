"""Boxes stand below both who reads them and who draws them."""

import subprocess
import sys

from lavish.common import boxes, grounding


def test_drawing_needs_no_reader_of_text() -> None:
    code = "import sys, lavish.common.drawing; sys.exit('lavish.common.grounding' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_they_are_found_where_the_reader_is() -> None:
    assert grounding.Box is boxes.Box
    assert grounding.Grounding is boxes.Grounding
    assert {"parse", "draw", "prompt", "render", "strip"} <= set(grounding.__all__)
