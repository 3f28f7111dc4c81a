"""Hides packages from every process that has this folder in PYTHONPATH, as if they were not installed."""

import importlib.machinery
import os
import sys

HIDDEN = set(filter(None, os.environ.get("HIDDEN_PACKAGES", "").split(",")))


class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, fullname, path=None, target=None):
        return None if fullname.split(".")[0] in HIDDEN else super().find_spec(fullname, path, target)


if HIDDEN:
    sys.meta_path[:] = [Without if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
