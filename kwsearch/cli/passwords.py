"""Passwords in URLs: not where other users see processes."""

from __future__ import annotations

import os
import sys

from kwsearch.passwords import STORAGE, without_password


def hide_password() -> None:
    """Start this program again if a password is among its arguments, which everybody can see: the
    URL is in the environment then, which others cannot.
    """
    arguments = sys.argv[1:]
    if without_password("\n".join(arguments)) == "\n".join(arguments):
        return
    kept: list[str] = []
    for place, argument in enumerate(arguments):
        name, _, url = argument.partition("=")
        if name == "--storage" and url:
            os.environ[STORAGE] = url
        elif place and arguments[place - 1] == "--storage":
            kept.pop()
            os.environ[STORAGE] = argument
        else:
            kept.append(argument)
    if len(kept) < len(arguments):
        program = sys.orig_argv[: len(sys.orig_argv) - len(arguments)]
        os.execv(sys.executable, [sys.executable, *program[1:], *kept])
