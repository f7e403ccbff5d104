"""When, where and with what numbers were made: date (UTC), versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

from diablo_theory import __version__
from diablo_theory.ops import compiled

PACKAGES = ("torch", "transformers", "peft", "accelerate", "numpy", "scipy", "pandas", "safetensors", "gguf")


def provenance(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a result on ``device``, ready for JSON."""
    commit = _git("rev-parse", "HEAD")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "package_version": __version__,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_kernels": compiled.status(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "commit": commit,
        "dirty": None if commit is None else bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def peak_rss_gib() -> float | None:
    """The most memory that this process has held, or None where the system does not say."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def _git(*arguments: str) -> str | None:
    # Only the checkout that holds the package counts, not a repository that happens to surround site-packages.
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
