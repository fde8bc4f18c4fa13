"""A secret shows nowhere but where it is asked for, and is taken out of what others write."""

import copy
import json
import pickle
from urllib.parse import quote

import pytest
import yaml

from orchestrator.secrets import Secret, redact

VALUE = "sss_c4n4ry/with+signs&more"


@pytest.fixture
def secret() -> Secret:
    return Secret(VALUE)


def test_only_reveal_shows_the_value(secret: Secret) -> None:
    shown = [
        str(secret),
        repr(secret),
        f"{secret:>40}",
        f"{secret!r}",
        f"{secret}",
        json.dumps([secret], default=str),
    ]
    assert not [text for text in shown if "c4n4ry" in text]
    assert secret.reveal() == VALUE


def test_nothing_serialises_it(secret: Secret) -> None:
    for write in (pickle.dumps, json.dumps, yaml.safe_dump, yaml.dump, copy.deepcopy, vars):
        with pytest.raises((TypeError, yaml.YAMLError)) as refused:
            write({"token": secret} if write is not vars else secret)
        assert "c4n4ry" not in str(refused.value)


def test_compares_by_value(secret: Secret) -> None:
    assert secret == Secret(VALUE)
    assert secret != Secret("another")
    assert secret != VALUE
    assert {secret: 1}[Secret(VALUE)] == 1


def test_an_empty_one_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Secret("")


@pytest.mark.parametrize("form", [VALUE, quote(VALUE), quote(VALUE, safe="")])
def test_redact_takes_every_form_out(secret: Secret, form: str) -> None:
    assert redact(f"GET /x?token={form}&y=1") == "GET /x?token=***&y=1"


def test_redact_takes_the_longer_of_two_first() -> None:
    Secret("abcdefgh")
    Secret("abcdefgh-and-more")
    assert redact("abcdefgh-and-more, abcdefgh") == "***, ***"


def test_redact_takes_out_a_credential_that_nobody_declared() -> None:
    text = 'curl -H "Authorization: Bearer n0t-kn0wn" https://host/  Cookie: cli_token=sss_x; a=b'
    assert redact(text) == 'curl -H "Authorization: Bearer ***" https://host/  Cookie: cli_token=***; a=b'
    assert redact("the bearer of this letter") == "the bearer *** this letter"
