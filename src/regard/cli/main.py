"""The `regard` command: its verbs, and how their errors end.

An error made on purpose is one line on standard error and exit code 2; anything else is a bug and
keeps its traceback.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import regard
from regard.bench.record import arguments_checked
from regard.cli.atlas import Survey
from regard.cli.bench import bench
from regard.cli.compare import Compare
from regard.cli.env import env
from regard.cli.evaluate import Evaluate
from regard.cli.fit import Fit
from regard.cli.info import info
from regard.cli.list import list_cards
from regard.cli.output import notice
from regard.cli.plan import plan
from regard.cli.show import show
from regard.cli.study import Study
from regard.core.errors import RegardError

FAILED = 2


class Verbs(TyperGroup):
    """The verbs in the order of a first encounter; errors of the library become messages."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with arguments_checked():
                parsed = super().invoke(ctx)
            if isinstance(parsed, Compare | Evaluate | Fit | Survey | Study):
                parsed.run()
        except RegardError as error:
            where = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            notice(f"regard: {' '.join(str(error).split())}{where}")
            raise typer.Exit(FAILED) from error


app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Attention: mechanisms and how they compare, plans and what they do to models.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"regard {regard.__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    """Take the options that stand before a verb."""


app.command("list")(list_cards)
app.command("info")(info)
app.command("show")(show)
app.command("compare")(Compare)
app.add_typer(bench, name="bench")
app.add_typer(plan, name="plan")
app.command("evaluate")(Evaluate)
app.command("atlas")(Survey)
app.command("fit")(Fit)
app.command("study")(Study)
app.command("env")(env)
