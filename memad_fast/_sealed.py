"""JSON files that tell whether they are whole: "format", "format_version", and "checksum" of all else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memad_fast import __version__


def checksum(content: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON, without the checksum itself."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def parse(text: bytes, path: Path, *, what: str, format: str, version: int, error: type[ValueError]) -> dict[str, Any]:
    """The content of the file ``path``, which is ``what`` of ``format``, in versions up to ``version``.

    Raises:
        error: it is truncated, altered, something else, or of a later version.
    """
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except ValueError as problem:
        raise error(f"{path}: not valid JSON, truncated or altered: {problem}") from problem
    if not isinstance(content, dict) or content.get("format") != format:
        raise error(f"{path}: not {what}")
    found = content.get("format_version")
    if not isinstance(found, int) or found < 1:
        raise error(f"{path}: altered, format_version is {found!r}")
    if found > version:
        raise error(
            f"{path}: format version {found} was written by a later memad_fast; this one ({__version__}) reads up to"
            f" version {version}: upgrade memad_fast"
        )
    if content.get("checksum") != checksum(content):
        raise error(f"{path}: altered, its checksum does not match its content")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
