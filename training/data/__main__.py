"""``python -m training.data build --config build.json``: see ``training.data.build``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def build(config: Path, out: Path | None = None, workers: int | None = None) -> None:
    """Builds or resumes a data set.

    Args:
        config: JSON with the fields of ``training.data.build.Build``; unknown keys are refused.
        out: instead of the config's. workers: tasks at a time, instead of the config's.
    """
    from .. import strict
    from .build import Build, run

    given = {"out": out and str(out), "workers": workers}
    print(run(strict.read(Build, config, **{k: v for k, v in given.items() if v is not None})))


def main(args: Sequence[str] | None = None) -> None:
    try:
        import tyro
    except ImportError as e:
        raise SystemExit("tyro is not installed: pip install 'qwen3-kernels[train]'") from e
    try:
        tyro.extras.subcommand_cli_from_dict({"build": build}, args=args, prog="python -m training.data", description=__doc__)
    except (ValueError, OSError, RuntimeError, ImportError) as e:
        raise SystemExit(f"error: {e}") from e


if __name__ == "__main__":
    main()
