"""The command ``shaped-attn env``."""

from __future__ import annotations

import json

import click

from .common import json_option


@click.command()
@json_option
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
