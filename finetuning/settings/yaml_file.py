"""YAML that people write by hand: each line means what it says, or is a fault with one message."""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    """Plain values only: a date stays the text that it is, and no mapping takes over another one's keys (`<<`)."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Taken over and over, keys would need more memory than there is."""


_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":merge"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(text: str) -> Any:
    """The content of a YAML document of plain values.

    Raises:
        ValueError: it is no YAML, or gives a key of its outermost mapping twice.
    """
    try:
        node = yaml.compose(text, _Loader)
        content = yaml.load(text, _Loader)
    except Exception as error:  # of YAML's own kind, or what its constructors let through, e.g. for `!!int x`
        raise ValueError(f"not YAML ({' '.join(str(error).split()) or type(error).__name__})") from error
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"{', '.join(twice)}: given twice; keep one of the lines")
    return content
