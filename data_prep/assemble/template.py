"""The chat template of an assembled model: the language model's own, for messages whose content has images."""

from __future__ import annotations

import json

# Turns each message's parts into one text, as a language model's template expects it.
_FLATTEN = """\
{%- set plain = namespace(messages=SYSTEM) -%}
{%- for message in messages -%}
  {%- set flat = namespace(text='') -%}
  {%- if message['content'] is string -%}
    {%- set flat.text = message['content'] -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' -%}{%- set flat.text = flat.text + IMAGE -%}
      {%- else -%}{%- set flat.text = flat.text + part['text'] -%}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {%- set plain.messages = plain.messages + [{'role': message['role'], 'content': flat.text}] -%}
{%- endfor -%}
{%- set messages = plain.messages -%}
"""


def with_images(template: str, image_token: str, system: str | None = None) -> str:
    """A Jinja template that gives `template` messages of text only; an image becomes its token and a line break.

    `system` stands in for the system sentence of a conversation without one; None leaves that to `template`.
    """
    first = "[]"
    if system is not None:
        first = f"[] if messages[0]['role'] == 'system' else [{{'role': 'system', 'content': {json.dumps(system)}}}]"
    return _FLATTEN.replace("SYSTEM", first).replace("IMAGE", json.dumps(image_token + "\n")) + template
