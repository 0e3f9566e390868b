"""Secrets in what is written down: none of them reaches a file of a run, a log, a page or the terminal.

A secret comes in by a URL (`https://user:password@host/x`, `?token=…`, signed links), or by a variable of the
environment that a shell has put into a command line. It is used as it was given, and what is written goes without: a
run that goes on is given it anew by its command. What identifies a run holds no URL, so both are the same run. A leaf:
every module may import it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from typing import Any, TypeVar

T = TypeVar("T")
GONE = "***"
"""Stands where a secret was."""
WHOLE = ("notify",)
"""Settings whose URL is a secret by its path: of it only the host is written."""
SHORTEST = 8
"""Characters of a variable's value from which it is looked for; a shorter one would be found in any text."""
URL = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`|\\]+")
USER = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s]*@")
VALUE = re.compile(r"([?&;#][^=&;#]*=)([^&;#]*)")
HARMLESS = re.compile(r"true|false|[0-9]{0,4}", re.IGNORECASE)
"""Values in the query of a URL that say nothing: ?download=true, ?page=2."""
KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}"
    r"|sk-(?:(?:ant|proj|svcacct)-)?[A-Za-z0-9_]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16})"
)
"""Tokens that are known by how they begin: Hugging Face, GitHub, GitLab, Slack, OpenAI and alike, AWS."""
NAMES = re.compile(r"(?:^|_)(?:TOKEN|SECRET|SECRETS|PASSWORD|PASSWD|KEY|APIKEY|CREDENTIALS?)(?:_|$)", re.IGNORECASE)
"""Variables of the environment that hold a secret: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, DB_PASSWORD …"""
PLACES = re.compile(r"_(?:PATH|FILE|DIR|HOME|ID_FILE)$", re.IGNORECASE)
"""Ends of the names of variables that say where a secret lies."""
FLAG = re.compile(rf"(--(?:{'|'.join(WHOLE)})(?:=|\s+)['\"]?)([a-z]+://[^/\s'\"]*)/[^\s'\"]*", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with `***` for what is secret in its URLs and for tokens, `$NAME` for values of secret variables.

    >>> without_secrets("https://me:pw@host/a.jsonl?sig=6yB%2B&page=2 failed")
    'https://***@host/a.jsonl?sig=***&page=2 failed'
    """
    if "://" in text:
        text = URL.sub(_plain_url, USER.sub(rf"\1{GONE}@", FLAG.sub(rf"\1\2/{GONE}", text)))
    text = KNOWN.sub(GONE, text)
    for value, name in _secret_values(os.environ).items():
        text = text.replace(value, f"${name}")
    return text


def recorded(value: T) -> T:
    """JSON values (settings, a summary) as they may be written: `without_secrets` of every text in them."""
    if isinstance(value, str):
        return without_secrets(value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: _host_alone(one) if key in WHOLE else recorded(one) for key, one in value.items()}  # type: ignore[return-value]
    if isinstance(value, list | tuple):
        return type(value)(recorded(one) for one in value)  # type: ignore[return-value, call-arg]
    return value


def is_redacted(url: str) -> bool:
    """Whether a URL has lost its secret: it was taken from what a run has written down, and leads nowhere."""
    return "://" in url and any(mark in url for mark in (f"//{GONE}@", f"={GONE}", f"/{GONE}"))


def _plain_url(found: re.Match[str]) -> str:
    url, end = found[0], ""
    # What closes a sentence or a bracket around it.
    while url and url[-1] in ").,;:!?]}":
        url, end = url[:-1], url[-1] + end
    return VALUE.sub(lambda pair: pair[0] if HARMLESS.fullmatch(pair[2]) else pair[1] + GONE, url) + end


def _host_alone(value: Any) -> Any:
    """Of a URL its scheme and host."""
    if not isinstance(value, str) or "://" not in value:
        return recorded(value)
    scheme, _, rest = value.partition("://")
    return f"{scheme}://{re.split('[/?#]', rest.rpartition('@')[2] if '@' in rest.split('/')[0] else rest)[0]}/{GONE}"


def _secret_values(environment: Mapping[str, str]) -> dict[str, str]:
    """Value → name of the variables that hold secrets, the longest value first, for one may hold another."""
    named = tuple((name, value) for name, value in environment.items() if NAMES.search(name))
    return _values(named)


@functools.lru_cache(4)
def _values(named: tuple[tuple[str, str], ...]) -> dict[str, str]:
    kept = {
        value: name
        for name, value in named
        # A word in small letters is a word of the language, and true, 0 or a region says nothing.
        if len(value) >= SHORTEST and not (value.isalpha() and value.islower()) and not PLACES.search(name)
    }
    return dict(sorted(kept.items(), key=lambda item: -len(item[0])))
