"""Passwords in addresses, replaced by *** before an address is written or shown."""

from __future__ import annotations

import re

MASK = "***"
# Greedy up to the last @ of the word: an unescaped @ or / in a password must not leave its rest visible.
_USER_INFO = re.compile(r"(?P<before>[A-Za-z][\w.+-]*://[^\s:/@'\"]*:)[^\s'\"]+@")
_QUERY = re.compile(r"(?P<before>[?&](?:password|passwd|pwd|token|secret|sslpassword)=)[^\s&'\"]+", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with *** for every password in an address, as in `scheme://user:password@host` or `?password=...`."""
    for pattern in (_USER_INFO, _QUERY):
        text = pattern.sub(lambda found: found["before"] + MASK + ("@" if found[0].endswith("@") else ""), text)
    return text


def is_masked(address: str) -> bool:
    """Whether `masked` replaced a password in this address."""
    return f":{MASK}@" in address or f"={MASK}" in address
