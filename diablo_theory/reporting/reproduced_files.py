"""What the JSON files of a reproduction's folder say, for pydantic to check."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from diablo_theory.records import Count, Real, Score
from diablo_theory.reporting.names import METHODS, PROFILES, one_of

Scale = Literal["full", "small"]
_Amount = Annotated[Real, Field(ge=0)]


class _Part(BaseModel):
    """What is read of a JSON file, which may say more, and may leave out what has a default."""

    model_config = ConfigDict(strict=True)


class _Model(_Part):
    name: str = ""
    source: str | None = None
    sha256: str | None = None


class _Settings(_Part):
    overrides: dict[str, Any] = {}


class Manifest(_Part):
    """What manifest.json says."""

    scale: Scale
    profile: Annotated[str, one_of("profile", PROFILES)] = "default"
    settings: _Settings = _Settings()
    model: _Model = _Model()
    package_version: str | None = None
    python: str | None = None
    torch: str | None = None
    transformers: str | None = None
    peft: str | None = None
    platform: str | None = None
    cpu: str | None = None
    threads: Count | None = None
    device: str | None = None
    commit: str | None = None
    commits: list[str | None] = []
    dirty: bool | None = None
    started: str | None = None
    finished: str | None = None
    memory_gib: _Amount | None = None
    peak_rss_gib: _Amount | None = None
    seconds: _Amount | None = None
    stages: dict[str, _Amount] = {}


class Run(_Part):
    """What config.json and metrics.json say of a run, whichever of them does."""

    model: str | None = None
    method: Annotated[str, one_of("method", METHODS)] | None = None
    label: str | None = None
    seed: Count | None = None
    scale: Scale | None = None
    trainable_params: Count | None = None
    trainable_pct: Annotated[Real, Field(ge=0, le=100)] | None = None
    num_blocks: Count | None = None
    learning_rate: Annotated[Real, Field(gt=0)] | None = None
    steps: Count | None = None
    batch_size: Count | None = None
    train_seconds: _Amount | None = None
    final_train_loss: Real | None = None
    scores: dict[str, Score] | None = None
