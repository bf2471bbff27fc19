"""A request's fields, parsed as those of the model "tiny"."""

from inference.server.openai_request import parsed


def call(chat=False, **fields):
    what = {"messages": [{"role": "user", "content": "hi"}]} if chat else {"prompt": "hi"}
    return parsed(what | fields, chat, "tiny")
