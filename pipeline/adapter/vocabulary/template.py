"""The chat template of an exported checkpoint: the original one, whose output gets the tokens of the selected sets.

The original template is printed into a variable and the tokens are inserted into that text. So what the template does
with roles, images and tools stays as it is, and nothing that a message contains can become a token of a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.adapter.vocabulary.tokens import IDENTITY, Added, quoted
from pipeline.backbones.families.base import LMMFamily
from pipeline.data.conversation import Conversation
from pipeline.errors import UserError

# The conversations that `pipeline.data.conversation` writes without a chat template.
USER_ASSISTANT = """{%- if messages and messages[0].role == 'system' %}
{{- content_text(messages[0]) + ' ' }}
{%- else %}
{{- default_system }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'user' %}
{{- 'USER: ' }}
{%- if message['content'] is not string %}
{%- for part in message['content'] %}{% if part.type == 'image' %}{{ image_line }}{% endif %}{% endfor %}
{%- endif %}
{{- content_text(message) }}
{%- elif message.role == 'assistant' %}
{{- ' ASSISTANT: ' + content_text(message) + answer_end }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- ' ASSISTANT:' }}
{%- endif %}"""
CONTENT_TEXT = """{%- macro content_text(message) %}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}
{%- endif %}
{%- endmacro %}"""


@dataclass(frozen=True)
class Places:
    """Where sets stand in the text of a conversation.

    `first` is the text of the first token. `image` is the image's placeholder with the marker tokens around it that
    the template prints, "" where sets stand behind the first token always.
    """

    first: str
    image: str
    behind: bool  # whether sets stand behind the image

    @classmethod
    def of(cls, conversation: Conversation, family: type[LMMFamily], insertion: str) -> Places:
        """Those of a model's conversations; UserError where the first token is a word, which tokenizers may join."""
        tokenizer, text = conversation.tokenizer, conversation.text("?", True)
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        first = tokenizer.bos_token or max((token for token in special if text.startswith(token)), key=len, default="")
        if not first:
            raise UserError(
                f"The conversations of this model begin with the word {text.split()[0]!r}, not with a special token, "
                "so a chat template cannot put prompt sets behind their first token; expected another model, or "
                "`export` as an adapter."
            )
        if insertion == "after_bos":
            return cls(first, "", False)
        before, _, after = text.partition(conversation.image_token)
        start = _markers(before, special, family.image_prefix_tokens, str.endswith)
        end = _markers(after, special, family.image_suffix_tokens, str.startswith)
        return cls(first, f"{start}{conversation.image_token}{end}", insertion == "after_image")


def _markers(text: str, special: set[str], most: int, meets: Any) -> str:
    """The special tokens, at most so many, at the end or the start of a text."""
    found = ""
    for _ in range(most):
        rest = text[: len(text) - len(found)] if meets is str.endswith else text[len(found) :]
        token = max((token for token in special if token and meets(rest, token)), key=len, default="")
        found = token + found if meets is str.endswith else found + token
    return found


def original_template(conversation: Conversation) -> str:
    """The chat template that the model was trained with; UserError where it is not one text."""
    if not conversation.templated:
        values = {
            "default_system": conversation.system,
            "image_line": f"{conversation.image_token}\n",
            "answer_end": conversation.end_text,
        }
        return CONTENT_TEXT + "".join(f"{{%- set {k} = {quoted(v)} %}}" for k, v in values.items()) + USER_ASSISTANT
    template = conversation.processor.chat_template
    if not isinstance(template, str):
        raise UserError(
            f"The model has several chat templates ({', '.join(template)}); expected one, in chat_template.jinja."
        )
    return template


def chat_template(original: str, places: Places, tokens: Added) -> str:
    """The template that prints `original` with the tokens that a request asks for where sets stand.

    Where the argument `prompt_sets_of` is given and not the identity of `tokens`, it raises an error.

    Jinja drops a newline behind a block and spaces before one, which belong to the original template: empty
    expressions stand between.
    """
    identity, (hidden, replacement) = tokens.identity, map(quoted, tokens.hidden)
    head = f"""{{%- if {IDENTITY} | default("{identity}", true) != "{identity}" %}}
{{{{- raise_exception("The prompt sets of this checkpoint are {identity}, not " ~ {IDENTITY}) }}}}
{{%- endif %}}
{tokens.inserted()}
{{%- set conversation_text %}}{{{{ "" }}}}"""
    tail = f"""{{{{ "" }}}}{{% endset %}}
{{%- set conversation_text = conversation_text | replace({hidden}, {replacement}) %}}
{{%- set first = {quoted(places.first)} %}}
{{%- set rest = conversation_text[(first | length):] if conversation_text.startswith(first) else conversation_text %}}
{_inserted(places)}"""
    return head + original.removesuffix("\n") + tail


def _inserted(places: Places) -> str:
    """The end of the template: the text with the tokens where they belong."""
    plain = "{{- first ~ set_tokens ~ rest }}"
    if not places.image:
        return plain
    cut = "rpartition" if places.behind else "partition"
    order = "parts[0] ~ image ~ set_tokens" if places.behind else "parts[0] ~ set_tokens ~ image"
    return f"""{{%- set image = {quoted(places.image)} %}}
{{%- if image in rest %}}
{{%- set parts = rest.{cut}(image) %}}
{{{{- first ~ {order} ~ parts[2] }}}}
{{%- else %}}
{plain}
{{%- endif %}}"""
