"""`regard atlas`: what every head of a model does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from regard.bench.record import Record
from regard.cli.launching import Launch, Workers
from regard.cli.output import console, notice
from regard.core.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from regard.atlases.record import Atlas
    from regard.bench.showing.exhibit import Source

SAVED = "atlas.json"
PAGE = "atlas.html"
LACKS = "cannot serve this call: "
"""What stands before a probe's reason in its errors."""
KINDS = ("readings", "all")
Argument, Option = typer.Argument, typer.Option


class Survey(Record):
    """Measure what every attention head of a model does.

    MODEL is pocket; a folder that transformers, timm or diffusers saved; a name on the hub (of
    transformers), timm:NAME or diffusers:NAME; or the folder of an atlas that was saved, which is
    then shown instead of measured. Only safetensors are read, and no code that comes with a model
    is run.

    DATA is what the model reads, and without it what is at hand. Text: a file [Python's
    documentation], or `needle`: facts planted in text and asked, which experiments on answers want.
    Pictures: a folder or a file [handwritten digits]; models that compare pictures with captions
    get the files' names, models that answer get a question. Speech: .wav files [chirps]. Diffusion:
    a file of prompts, one per line [random states], beside random latents.

    Weights are streamed in tiles; no matrix of all weights is held. What a probe cannot measure in
    this model or on this data is said on standard error.

    Example: regard atlas pocket --length 1024 --out runs/atlas

    Example: regard atlas pocket --data needle --probes retrieval,path_patching

    Example: regard atlas my-vit --data photos --probes sinks,entropy

    Example: regard atlas runs/before --compare runs/after
    """

    model: Annotated[str, Argument(help="a model, or a saved atlas")] = "pocket"
    data: Annotated[
        Path | None, Option(help="a file or folder to read, or needle [what is at hand]")
    ] = None
    domain: Annotated[
        list[str] | None, Option(help="NAME=FILE, data of one kind; repeatable, to compare kinds")
    ] = None
    length: Annotated[int, Option(help="tokens per passage of text")] = 512
    examples: Annotated[int, Option(help="passages, of each kind")] = 4
    probes: Annotated[
        str, Option(help="readings (one forward per passage), all, or names with commas")
    ] = "readings"
    examples_kept: Annotated[int, Option(help="strongest queries kept per head")] = 3
    plan: Annotated[Path | None, Option(help="a plan's JSON file that the model follows")] = None
    top: Annotated[int, Option(help="heads to print per metric")] = 4
    compare: Annotated[
        Path | None, Option(help="folder of a saved atlas: print the heads that differ most")
    ] = None
    out: Annotated[
        Path | None, Option(help="folder for atlas.json, profiles.safetensors and atlas.html")
    ] = None
    launcher: Launch = "here"
    workers: Workers = None
    threads: Annotated[int | None, Option(min=1, help="processor threads")] = None
    no_progress: Annotated[bool, Option("--no-progress", help="draw no progress bar")] = False

    def run(self) -> None:
        """Measure or read, print, compare, save."""
        from regard.atlases.record import Atlas
        from regard.cli.atlas_tables import difference_table, tower_table
        from regard.report.atlas import write_atlas_page

        if min(self.length, self.examples, self.top) < 1:
            given = (self.length, self.examples, self.top)
            raise ArgumentError("length, examples, top", "at least 1", given)
        other = None if self.compare is None else Atlas.load(self.compare)
        saved = (Path(self.model) / SAVED).is_file()
        found = Atlas.load(self.model) if saved else self._measured()
        for note in told(found.notes):
            notice(note)
        if other is None:
            for tower in found.towers:
                console().print(tower_table(found, tower, self.top))
        else:
            console().print(difference_table(found, other, self.top))
        if self.out is not None:
            found.save(self.out)
            write_atlas_page(found, self.out / PAGE, other)
            console().print(f"atlas: {self.out / SAVED}")
            console().print(f"report: {self.out / PAGE}")

    def _measured(self) -> Atlas:
        from regard.bench.surveying import Surveying, surveyed
        from regard.cli.launching import launched
        from regard.cli.progress import share_bar
        from regard.plan import Plan

        launcher = launched(self.launcher, self.workers, self.threads)
        job = Surveying(
            self.model,
            tuple(self._sources()),
            self.examples,
            self.length,
            self.probes if self.probes in KINDS else _names(self.probes),
            self.examples_kept,
            None if self.plan is None else Plan.load(self.plan),
        )
        for note in job.exhibit.notes:
            notice(note)
        with share_bar(not self.no_progress) as watch:
            return surveyed(job, launcher, watch)

    def _sources(self) -> Sequence[Source]:
        from regard.bench.showing.exhibit import Source

        given = [_source(text) for text in self.domain or ()]
        if self.data is not None or not given:
            given.insert(0, Source(self.data))
        return given


def told(notes: Mapping[str, str]) -> list[str]:
    """Why probes could not be served, those of one probe and one reason in one line."""
    places: dict[tuple[str, str], list[str]] = {}
    for where, reason in notes.items():
        probe, _, tower = where.partition(" at ")
        places.setdefault((probe, reason.rpartition(LACKS)[2]), []).append(tower)
    return [
        f"{' at '.join(filter(None, (probe, ', '.join(towers))))}: {reason}"
        for (probe, reason), towers in places.items()
    ]


def _source(text: str) -> Source:
    """A kind of data from NAME=FILE."""
    from regard.bench.showing.exhibit import Source

    name, _, file = text.partition("=")
    if not (name and file):
        raise ArgumentError("domain", "NAME=FILE", text)
    return Source(Path(file), name)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
