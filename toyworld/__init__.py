"""A small rendered world: objects with attributes in contexts, whose truth is known because it was drawn."""

from .captions import Caption, caption, plain_caption
from .render import Rendering, render
from .scene import CATEGORIES, COLOURS, CONTEXTS, PATTERNS, Individual, Scene, View, sample_scene

__all__ = [
    "CATEGORIES",
    "COLOURS",
    "CONTEXTS",
    "PATTERNS",
    "Caption",
    "Individual",
    "Rendering",
    "Scene",
    "View",
    "caption",
    "plain_caption",
    "render",
    "sample_scene",
]
