"""The command ``shaped-attn env``."""

from __future__ import annotations

import json

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def env(as_json: bool) -> None:
    """Print what a bug report needs."""
    from .. import environment

    collected = environment.collect()
    if as_json:
        click.echo(json.dumps(collected, indent=1))
        return
    pairs = environment.lines(collected)
    width = max(len(name) for name, _ in pairs)
    for name, text in pairs:
        click.echo(f"{name:{width}}  {text}")
