"""The command `shaped-attn`, run in this process."""

from click.testing import CliRunner, Result

from shaped_attn.commands import cli


def invoke(*args, **env) -> Result:
    """What `shaped-attn *args` ends with and prints; `env` adds variables to its environment."""
    return CliRunner(env=env).invoke(cli, [str(arg) for arg in args])
