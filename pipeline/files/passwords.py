"""Passwords in addresses: kept out of everything that is written or shown."""

from __future__ import annotations

import re

MASK = "***"
# Up to the last @ of the word: a password that holds an unescaped @ or / must not show its end.
_USER_INFO = re.compile(r"(?P<before>[A-Za-z][\w.+-]*://[^\s:/@'\"]*:)[^\s'\"]+@")
_QUERY = re.compile(r"(?P<before>[?&](?:password|passwd|pwd|token|secret|sslpassword)=)[^\s&'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** in place of every password in an address, `scheme://user:password@host` or `?password=...`."""
    for pattern in (_USER_INFO, _QUERY):
        text = pattern.sub(lambda found: found["before"] + MASK + ("@" if found[0].endswith("@") else ""), text)
    return text


def is_masked(address: str) -> bool:
    """Whether the address once had a password that `masked` took out."""
    return f":{MASK}@" in address or f"={MASK}" in address
