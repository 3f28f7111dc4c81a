"""A contact sheet of the toy world: every category in every context, with masks and edges below.

python -m toyworld contact_sheet.png
"""

import sys

from . import CATEGORIES, COLOURS, CONTEXTS, render, sample_scene
from .render import contact_sheet

rows = []
for r, context in enumerate(CONTEXTS):
    colours = [list(COLOURS)[(r + c) % len(COLOURS)] if r % 2 else None for c in range(len(CATEGORIES))]
    scenes = [
        sample_scene(1000 * r + c, category=category, context=context, colour=colours[c])
        for c, category in enumerate(CATEGORIES)
    ]
    rows.append([render(scene).image for scene in scenes])
truth = [render(sample_scene(c, category=category)) for c, category in enumerate(CATEGORIES)]
rows += [[t.image for t in truth], [t.mask.convert("RGB") for t in truth], [t.edges.convert("RGB") for t in truth]]
contact_sheet(rows).save(sys.argv[1])
