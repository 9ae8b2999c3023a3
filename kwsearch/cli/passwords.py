"""Passwords in URLs: not where other users see processes."""

from __future__ import annotations

import os
import sys

from kwsearch.passwords import hidden, without_password


def hide_password() -> None:
    """Start this program again if a password is among its arguments, which everybody can see: it is
    in the environment then, which others cannot.
    """
    arguments = sys.argv[1:]
    if without_password("\n".join(arguments)) == "\n".join(arguments):
        return
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, url = argument.partition("=")
        if name == "--storage" and url:
            kept.append(f"{name}={hidden(url)}")
        elif place and arguments[place - 1] == "--storage":
            kept.append(hidden(argument))
        else:
            kept.append(argument)
    if kept != arguments:
        program = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execv(sys.executable, [sys.executable, *program[1:], *kept])
