"""The page README.md of an exported checkpoint."""

from __future__ import annotations

from pipeline.adapter.meta import Meta
from pipeline.adapter.vocabulary.part import VECTORS
from pipeline.adapter.vocabulary.tokens import SetTokens


def page_of_sets(meta: Meta, tokens: SetTokens) -> str:
    """What a checkpoint with sets is and how they are named, in Markdown."""
    first = tokens.names[0]
    text = f"""# {meta.model.path} with prompt sets for {", ".join(tokens.names)}

The frozen model and {len(tokens.names)} prompt sets of {tokens.length} vectors, learned with the method \
{meta.method.name}. Each set is a run of special tokens, which the chat template inserts for the names in its argument \
`prompt_sets`, the most similar set last. Without the argument it is the frozen model.

```python
inputs = processor.apply_chat_template(
    messages, prompt_sets=["{first}"], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
```

On a server with OpenAI's API the argument is `chat_template_kwargs` of the request:
`"chat_template_kwargs": {{"prompt_sets": ["{first}"]}}`. The template prints the first token of a conversation, so \
its text is tokenised with `add_special_tokens=False`.

`prompt_sets.json` lists the sets' tokens. The folder `adapter` has what chooses among the sets."""
    return _page(meta, text, [f"* The prompt sets: {meta.licence or 'not stated'}."])


def page_of_parts(meta: Meta) -> str:
    """What a checkpoint without sets is and how vectors are sent to it, in Markdown."""
    text = f"""# {meta.model.path} for prompt sets that requests bring along

The frozen model, and a chat template that puts the vectors of a request where the method {meta.method.name} has its \
prompt sets. Without vectors it is the frozen model. vLLM takes them, started with `--enable-prompt-embeds` and \
`--chat-template-content-format openai`: the first message of the request is
`{{"role": "user", "content": [{{"type": "prompt_embeds", "data": DATA}}]}}` with the base64 text of the [L, D] tensor \
as `torch.save` writes it, and `"chat_template_kwargs": {{"{VECTORS}": true}}` says so.

Any sets of this frozen model may be sent that are inserted at the same place."""
    return _page(meta, text, [])


def page_of_loras(meta: Meta) -> str:
    """What a checkpoint with low-rank updates is and how they are named, in Markdown."""
    text = f"""# {meta.model.path} with low-rank updates for {", ".join(meta.sets)}

The frozen model, and in the folder `lora` the update of each task that the method {meta.method.name} has learned, in \
PEFT's format. vLLM takes them by name: `--enable-lora --lora-modules NAME=lora/NAME`, and the name as `model` of a \
request. `prompt_sets.json` lists the tasks' names."""
    return _page(meta, text, [f"* The updates: {meta.licence or 'not stated'}."])


def _page(meta: Meta, text: str, licences: list[str]) -> str:
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    front += [f"license: {meta.licence}"] if meta.licence else []
    front += ["tags: [prompt-tuning, continual-learning, vision-language]", "---"]
    licences = [
        *licences,
        f"* The frozen weights: the licence of `{meta.model.path}`.",
        f"* The CLIP that the sets are chosen with: the licence of `{meta.clip.path}`.",
    ]
    return "\n".join([*front, "", text, "", "## Licences", "", *licences, ""])
