"""`regard plan`: read, check and apply plans, and list what they can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from regard.cli.output import console
from regard.cli.treatments import tell_treatment, treatment_record, treatments_table
from regard.core.errors import ArgumentError, RegardError
from regard.report.units import byte_size, percent

if TYPE_CHECKING:
    from regard.plan import Plan

File = Annotated[Path, typer.Argument(metavar="PLAN.json", help="a plan's JSON file")]
Json = Annotated[bool, typer.Option("--json", help="print it as JSON")]
MODEL = "pocket, a model's folder, or its name on the hub"

plan = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@plan.callback()
def main() -> None:
    """Say in a file what chosen heads and layers of a model do, and apply it.

    Example: regard plan check snapkv.json pocket
    """


@plan.command()
def show(file: File) -> None:
    """Tell a plan's steps in words.

    Example: regard plan show snapkv.json
    """
    from regard.cli.plan_words import told

    console().print("\n".join(told(_loaded(file), file.name)))


@plan.command()
def check(
    file: File, model: Annotated[str | None, typer.Argument(help=f"{MODEL} [none]")] = None
) -> None:
    """Check a plan; with a model, print which step acts on which head of which layer.

    The model's weights are not read, save the pocket model's.

    Example: regard plan check snapkv.json pocket
    """
    found = _loaded(file)
    if model is None:
        steps = len(found.steps)
        console().print(f"{file}: a valid plan of {steps} {'step' if steps == 1 else 'steps'}")
        return
    from regard.bench.subject import skeleton

    shape = skeleton(model)
    console().print(_named(file, lambda: found.explain(shape)))


@plan.command()
def apply(
    file: File,
    model: Annotated[str, typer.Argument(help=MODEL)] = "pocket",
    prompt: Annotated[str | None, typer.Option(help="text to go on from")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="or a file that holds it")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="tokens to generate at most")] = 64,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    json_wanted: Json = False,
) -> None:
    """Generate under a plan, greedily, and tell what its cache holds.

    Example: regard plan apply snapkv.json --prompt-file README.md --tokens 100
    """
    from regard.bench.generating import generated
    from regard.bench.subject import load

    found, text = _loaded(file), _prompt(prompt, prompt_file)
    subject = load(model, device)
    result = _named(file, lambda: generated(subject, found, text, tokens))
    if json_wanted:
        typer.echo(json.dumps({"plan": str(file), "model": model, **result}, indent=1))
        return
    console().print(result["text"])
    _print_cache(result["cache"])


@plan.command()
def treatments(
    name: Annotated[str | None, typer.Argument(help="tell all about this one")] = None,
    json_wanted: Json = False,
) -> None:
    """List what a step can do, or tell all about one treatment.

    Example: regard plan treatments snapkv
    """
    from regard.core.catalog import treatment
    from regard.core.catalog import treatments as every

    found = list(every().values()) if name is None else [treatment(name)]
    if json_wanted:
        records = [treatment_record(card) for card in found]
        shown = records if name is None else records[0]
        typer.echo(json.dumps(shown, indent=1, ensure_ascii=False))
    elif name is None:
        console().print(treatments_table(found))
    else:
        tell_treatment(found[0])


def _loaded(file: Path) -> Plan:
    from regard.plan import Plan

    return _named(file, lambda: Plan.load(file))


def _named(file: Path, work: Any) -> Any:
    """What work returns; an error tells the plan's file."""
    try:
        return work()
    except RegardError as error:
        if str(file) not in str(error):
            error.add_note(f"in {file}")
        raise


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise ArgumentError("prompt, prompt-file", "exactly one of the two", "both or none")
    if file is None:
        return prompt or ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError("prompt-file", f"a readable text file ({error})", file) from error


def _print_cache(report: dict[str, Any]) -> None:
    screen = console()
    table = Table(title="cache")
    for name in ("layer", "key heads", "keys", "of", "bytes"):
        table.add_column(name, justify="right")
    for layer in report["layers"]:
        for bucket in layer["buckets"]:
            heads = ", ".join(map(str, bucket["heads"]))
            cells = (layer["layer"], heads, bucket["keys"], layer["seen"])
            table.add_row(*map(str, cells), byte_size(bucket["bytes"]))
    screen.print(table)
    screen.print(
        f"{byte_size(report['bytes'])} of {byte_size(report['dense_bytes'])}: budget (kept) "
        f"{percent(report['budget'])}, compression ratio (removed) "
        f"{percent(report['compression_ratio'])}"
    )
