"""Passwords in URLs, which are not written down."""

from __future__ import annotations

import re

# The variable that has a URL of a database with its password.
STORAGE = "KWSEARCH_STORAGE"

_USER = re.compile(r"(\w[\w+.-]*://[^\s:/@]*):[^\s]*@")
_QUERY = re.compile(r"([?&](?:password|passwd|pwd)=)[^&\s'\"]*", re.IGNORECASE)


def without_password(text: str) -> str:
    """URLs in it keep all but their passwords."""
    return _QUERY.sub(r"\1***", _USER.sub(r"\1:***@", text))
