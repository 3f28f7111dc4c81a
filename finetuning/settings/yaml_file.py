"""Reads YAML files that people write by hand. Each line either means what it seems to mean, or it is reported."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Loads plain values only: dates stay text, and `<<` does not merge the keys of another mapping into one."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge nothing: a small file of nested merges could otherwise fill all memory."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The content of a YAML document of plain values.

    Raises:
        ValueError: if it is not YAML, or if its outermost mapping has a key twice.
    """
    try:
        node = yaml.compose(text, _Loader)
        content = yaml.load(text, _Loader)
    except Exception as error:  # YAML's own errors, and others that its constructors raise, e.g. for `!!int x`
        raise ValueError(f"not YAML ({' '.join(str(error).split()) or type(error).__name__})") from error
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{', '.join(twice)}: given twice; keep one of the lines")
    return content
