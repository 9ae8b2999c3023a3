"""Passwords in URLs, which are not written down."""

from __future__ import annotations

import os
import re

# The variable that has a URL of a database with its password; and what was given in place of it,
# after `hidden` took it out of sight.
STORAGE, _GIVEN = "KWSEARCH_STORAGE", "KWSEARCH_STORAGE_GIVEN"

_USER = re.compile(r"(\w[\w+.-]*://[^\s:/@]*):[^\s]*@")
_QUERY = re.compile(r"([?&](?:password|passwd|pwd|sslpassword)=)[^&\s'\"]*", re.IGNORECASE)
# Of one URL, which may have anything in it.
_WHOLE = re.compile(r"^(\w[\w+.-]*://[^:/@]*):.*@", re.DOTALL)


def of_environment() -> str | None:
    """What $KWSEARCH_STORAGE has."""
    return os.environ.get(STORAGE) or None


def masked(url: str) -> str:
    """A URL without its password."""
    return _QUERY.sub(r"\1***", _WHOLE.sub(r"\1:***@", url))


def without_password(text: str) -> str:
    """A text in which URLs keep all but their passwords, as far as those have no blanks."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1:***@", text))


def hidden(url: str) -> str:
    """It without its password, which `whole` knows, in this process and those that it starts."""
    os.environ[_GIVEN] = url
    return masked(url)


def whole(url: str) -> str:
    """What `hidden` was given, of what it gave; another as it is."""
    given = os.environ.get(_GIVEN)
    return given if given is not None and masked(given) == url else url
