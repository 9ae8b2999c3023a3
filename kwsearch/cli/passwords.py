"""Passwords in URLs: not where other users see processes."""

from __future__ import annotations

import os
import sys

from kwsearch.passwords import hidden, masked


def hide_password() -> None:
    """Start this program again if a password is among its arguments, which everybody can see: it is
    in the environment then, which others cannot.
    """
    arguments = sys.argv[1:]
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, url = argument.partition("=")
        if name == "--storage" and masked(url) != url:
            kept.append(f"{name}={hidden(url)}")
        elif place and arguments[place - 1] == "--storage" and masked(argument) != argument:
            kept.append(hidden(argument))
        else:
            kept.append(argument)
    if kept != arguments:
        program = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execv(sys.executable, [sys.executable, *program[1:], *kept])
