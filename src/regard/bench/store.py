"""The result folder: OUT/trials/<id>.json for every finished trial, OUT/comparison.json for the
whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from regard.bench.record import read_record, write_json
from regard.bench.trial import Trial
from regard.core.errors import ArgumentError


class Store:
    """Finished trials of a result folder, read once and added to.

    A trial is written only when it is finished and in one step, so whatever ends the process costs
    the running trial and no other.

    Raises:
        ArgumentError: `out` is no folder or cannot be made, or OUT/trials holds anything but
            trials; the file is named.
    """

    def __init__(self, out: Path) -> None:
        self.folder = out / "trials"
        for place in (out, self.folder):
            _check_folder(place)
        self.trials = {trial.config.id: trial for trial in self._stored()}

    def _stored(self) -> Iterator[Trial]:
        for path in sorted(self.folder.iterdir()):
            if path.name.endswith(".json.part"):  # left by a process that ended while writing
                continue
            if path.suffix != ".json" or not path.is_file():
                raise ArgumentError(str(path), "only trial files in a trials folder", "another")
            trial = read_record(path, Trial)
            if trial.config.id != path.stem:
                raise ArgumentError(str(path), f"the name {trial.config.id}.json", path.name)
            yield trial

    def add(self, trial: Trial) -> None:
        """Keep a finished trial."""
        write_json(self.folder / f"{trial.config.id}.json", trial)
        self.trials[trial.config.id] = trial


def _check_folder(place: Path) -> None:
    if place.exists() and not place.is_dir():
        raise ArgumentError("out", "a folder", f"the file {place}")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError("out", f"a folder that can be made ({place})", error.strerror) from (
            error
        )
