"""Where the metrics of a training go besides its metrics.jsonl: accelerate's trackers."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from pykalm.config import Config
from pykalm.errors import TrainingError
from pykalm.processes import is_main


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise TrainingError for a tracker whose package is not there; accelerate leaves it out without a word."""
    if missing := sorted(set(trackers) - {str(tracker) for tracker in get_available_trackers()}):
        raise TrainingError(
            f"training.trackers: wanted {', '.join(missing)}, found no package of that name. "
            "Run `pip install -e '.[tracking]'`, or leave it out."
        )


@contextlib.contextmanager
def tracking(config: Config, folder: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield what gives a step's report to accelerate's trackers; they are closed at the end, whatever it is.

    Trackers of the main process; in the others it does nothing.
    """
    names = list(config.training.trackers) if is_main() else []
    if not names:
        yield lambda values: None
        return
    accelerator = Accelerator(cpu=config.training.device == "cpu", log_with=names, project_dir=str(folder))
    accelerator.init_trackers("kalm", config={"settings": config.to_yaml()})

    def track(report: Mapping[str, Any]) -> None:
        accelerator.log({key: value for key, value in report.items() if value is not None}, step=report["step"])

    try:
        yield track
    finally:
        for tracker in accelerator.trackers:  # end_training would part the processes, too
            tracker.finish()
