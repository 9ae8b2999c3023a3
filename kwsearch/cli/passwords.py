"""Passwords in URLs: not in what is written down, and not where other users see processes."""

from __future__ import annotations

import os
import re
import sys

STORAGE = "KWSEARCH_STORAGE"
_URL = re.compile(r"(\w[\w+]*://[^\s:/@]*):[^\s/]*@")


def without_password(text: str) -> str:
    """URLs in it keep all but their passwords."""
    return _URL.sub(r"\1:***@", text)


def hide_password() -> None:
    """Start this program again if a password is among its arguments, which everybody can see: the
    URL is in the environment then, which others cannot.
    """
    arguments = sys.argv[1:]
    if not any(_URL.search(argument) for argument in arguments):
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
        os.execv(sys.executable, [sys.executable, "-m", "kwsearch", *kept])
