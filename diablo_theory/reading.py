"""What users write, as values: YAML in which no key stands twice, and what is wrong with it in one line."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from diablo_theory.errors import ConfigError, nearest


class _OnceEach(yaml.SafeLoader):
    """PyYAML takes the last of two equal keys; here they are an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def parsed(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: If it is none; the message is one line.
    """
    try:
        return _OnceEach(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"{error.problem}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # PyYAML lets through what Python says of dates that do not exist, of tags that do not fit, of too much nesting.
    except (ValueError, AttributeError, KeyError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def find(path: Path, *roots: Path) -> Path:
    """A YAML file seen from the working folder, or else from the first root that has it.

    Args:
        path: As a user names it.
        roots: Other folders that it may lie below.

    Raises:
        ConfigError: If it is a folder, or nowhere; then it names the nearest there is in the file's folder or, if that
            is missing too, in the folders beside it.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder: name a file in it")
    places = [Path(), *roots]
    for root in places:
        if (root / path).is_file():
            return root / path
    around = [(root, file) for root in places for file in _around(root / path)]
    known = {str(file if path.is_absolute() else file.relative_to(root)) for root, file in around}
    raise ConfigError(f"no such file: {path}.{nearest(str(path), known)}")


def _around(path: Path) -> Iterable[Path]:
    folder = path.parent
    return folder.glob("*.yaml") if folder.is_dir() else folder.parent.glob("*/*.yaml")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping.

    Raises:
        ConfigError: If it is missing (naming the nearest file there is), unreadable, or no mapping of names.
    """
    file = find(path)
    try:
        content = parsed(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(content).__name__}")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise ConfigError(f"{path}: keys must be names, got {odd[0]!r} (unquoted, YAML reads on, yes, no as truths)")
    return content
