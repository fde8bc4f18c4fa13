"""Tokens that cannot be shown by accident, and a filter for texts that others write."""

import hmac
import re
from typing import NoReturn
from urllib.parse import quote, quote_plus

_MASK = "***"
_values: set[str] = set()
# A token that nobody made a Secret of yet, such as one that a tool has just been given and prints.
_CREDENTIAL = re.compile(r"(\bbearer\s+|\bcli_token=|\bX-Amz-[\w-]+=|[?&]sig(?:nature)?=)[^\s\"';,&]+", re.IGNORECASE)


class Secret:
    """A value that only `reveal` shows: not print, format, a log, JSON or pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        if not value:
            raise ValueError("a secret is not empty")
        self._value = value
        _values.add(value)

    def reveal(self) -> str:
        return self._value

    def __str__(self) -> str:
        return _MASK

    def __repr__(self) -> str:
        return f"Secret({_MASK})"

    def __format__(self, _spec: str) -> str:
        return _MASK

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    def __hash__(self) -> int:
        return hash(self._value)

    def __reduce_ex__(self, _protocol: object) -> NoReturn:
        raise TypeError("a Secret is neither pickled nor copied")


def redact(text: str) -> str:
    """The text without what was made a Secret in this process, URL-encoded or not, and without bearer tokens."""
    forms = {
        form for value in tuple(_values) for form in (value, quote(value), quote(value, safe=""), quote_plus(value))
    }
    for form in sorted(forms, key=len, reverse=True):  # the longer first: one may be part of another
        text = text.replace(form, _MASK)
    return _CREDENTIAL.sub(rf"\1{_MASK}", text)
