"""`cgmq-fx completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(context: click.Context, shell: str) -> None:
    """Print the script that makes SHELL complete commands, options and targets.

    \b
    Examples:
        eval "$(cgmq-fx completion bash)"      in ~/.bashrc
        eval "$(cgmq-fx completion zsh)"       in ~/.zshrc
        cgmq-fx completion fish > ~/.config/fish/completions/cgmq-fx.fish
    """  # noqa: D301 - click wants the backspace
    script = get_completion_class(shell)
    assert script is not None
    root = context.find_root().command
    click.echo(script(root, {}, "cgmq-fx", "_CGMQ_FX_COMPLETE").source())
