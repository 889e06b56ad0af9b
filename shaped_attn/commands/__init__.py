"""The command ``shaped-attn``: ``bench``, ``check``, ``compare``, ``demo``, ``env``, and more.

Exit codes: 0 done, 1 a check exceeded its budget, a comparison found a difference or the command
failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys

import click

from .._version import __version__
from . import common

NAMES = ("bench", "check", "compare", "demo", "env", "predict", "train")
"""Of the commands; each has a module of its own."""


class _Commands(click.Group):
    """A group that imports the module of a command when it is asked for."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(NAMES)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in NAMES:
            return None
        return getattr(importlib.import_module(f".{name}", __name__), name)


def main() -> None:
    """Entry point of the console script and of ``python -m shaped_attn``."""
    common.is_program = True
    try:
        code = cli.main(prog_name="shaped-attn", standalone_mode=False)
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted.", err=True)
        code = common.INTERRUPTED
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    sys.exit(code)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="shaped-attn")
def cli() -> None:
    """Shaped attention: identity + softmax - mean, in one fused pass."""
