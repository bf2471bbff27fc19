"""Who may ask: other hosts' names, other sites' pages, and keys."""

import asyncio

import pytest

from inference.server.gate import Gate
from inference.server.refused import Refused


def asked(path="/v1/models", keys=(), names=("box.example",), client="10.0.0.7", **headers):
    """The owner that the application behind the gate is told."""
    told = []

    async def app(scope, receive, send):
        told.append(scope["state"]["owner"])

    pairs = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    scope = {"path": path, "headers": pairs, "client": (client, 5), "state": {}}
    asyncio.run(Gate(app, keys, names)(scope, None, None))
    return told[0]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "localhost:8000"},
        {"host": "127.0.0.1:8000"},
        {"host": "[::1]:8000", "origin": "http://[::1]:8000"},
        {"host": "192.168.0.9"},
        {"host": "BOX.example:80"},
        {"host": "localhost:8000", "origin": "http://localhost:8000"},
        {"host": "127.0.0.1:8000", "origin": "https://box.example"},
    ],
)
def test_its_own_names_and_pages_may_ask(headers):
    assert asked(**headers) == "10.0.0.7"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example:8000"}, "wrong_host"),
        ({"host": "localhost.evil.example"}, "wrong_host"),
        ({"host": "127.0.0.1.evil.example:8000", "origin": "http://127.0.0.1.evil.example:8000"}, "wrong_host"),
        ({"host": "[::1"}, "wrong_host"),
        ({"host": "127.0.0.1:8000", "origin": "http://evil.example"}, "wrong_origin"),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, "wrong_origin"),
        ({"host": "127.0.0.1:8000", "origin": "null"}, "wrong_origin"),
        ({"origin": "http://evil.example"}, "wrong_origin"),
        ({"host": "localhost", "origin": "http://[evil"}, "wrong_origin"),
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/completions"])
def test_another_name_and_another_site_s_page_may_not(path, headers, code):
    with pytest.raises(Refused) as refused:
        asked(path, **headers)
    assert (refused.value.status, refused.value.code) == (403, code)


def test_a_key_is_needed_where_there_are_any_and_says_who_asks():
    keys = ("one", "two")
    assert [asked(keys=keys, authorization=f"Bearer {key}") for key in keys] == list(keys)
    assert asked(keys=keys, authorization="bearer  two ") == "two"
    for path in ("/", "/health"):
        assert asked(path, keys)
    for wrong in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer onetwo"}, {"authorization": "Basic one"}):
        for path in ("/v1/models", "/steps", "/metrics", "/v1/completions"):
            with pytest.raises(Refused) as refused:
                asked(path, keys, **wrong)
            assert (refused.value.status, refused.value.code) == (401, "invalid_api_key")
            assert "one" not in str(refused.value).split()
