"""The page README.md of an exported checkpoint."""

from __future__ import annotations

from pipeline.adapter.meta import Meta
from pipeline.adapter.vocabulary.tokens import SetTokens


def page(meta: Meta, tokens: SetTokens) -> str:
    """What the checkpoint is and how sets are named, in Markdown."""
    first = tokens.names[0]
    front = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text"]
    front += [f"license: {meta.licence}"] if meta.licence else []
    front += ["tags: [prompt-tuning, continual-learning, vision-language]", "---"]
    return "\n".join(
        [
            *front,
            "",
            f"# {meta.model.path} with prompt sets for {', '.join(tokens.names)}",
            "",
            f"The frozen model and {len(tokens.names)} prompt sets of {tokens.length} vectors, learned with the method "
            f"{meta.method.name}. Each set is a run of special tokens, which the chat template inserts for the names "
            "in its argument `prompt_sets`, the most similar set last. Without the argument it is the frozen model.",
            "",
            "```python",
            "inputs = processor.apply_chat_template(",
            f'    messages, prompt_sets=["{first}"], add_generation_prompt=True, tokenize=True, return_dict=True,',
            '    return_tensors="pt",',
            ")",
            "```",
            "",
            "On a server with OpenAI's API the argument is `chat_template_kwargs` of the request:",
            f'`"chat_template_kwargs": {{"prompt_sets": ["{first}"]}}`. The template prints the first token of a '
            "conversation, so its text is tokenised with `add_special_tokens=False`.",
            "",
            "`prompt_sets.json` lists the sets' tokens. The folder `adapter` has what chooses among the sets.",
            "",
            "## Licences",
            "",
            f"* The prompt sets: {meta.licence or 'not stated'}.",
            f"* The frozen weights: the licence of `{meta.model.path}`.",
            f"* The CLIP that the sets are chosen with: the licence of `{meta.clip.path}`.",
            "",
        ]
    )
