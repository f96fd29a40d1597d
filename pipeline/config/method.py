"""The section `method` of a recipe: a name, and exactly the options that the method of this name has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import Field, PlainValidator, SerializeAsAny, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import InitErrorDetails

from pipeline.config import registry
from pipeline.config.base import Section
from pipeline.config.messages import sentence
from pipeline.config.unfamiliar import Unfamiliar
from pipeline.errors import UserError, nearest

DEFAULT = "modalprompt"
# Fields that all methods had before each had options of its own; recipes of older runs and adapters have all of them.
ONCE_OF_ALL = (
    *("prompt_length", "init", "k", "selection", "insertion", "text_only", "gate", "earlier_gates", "image_weight"),
    "prototype_weight",
)
BOTH_BOUNDS = "expected gate or share, one way to say which modules are similar enough, and both are given"
Choice: TypeAlias = str | Mapping[str, Any]  # a name, or `{name: ..., and its options}`


@dataclass(frozen=True)
class FromRegistry:
    """Marks a field that takes a name of this kind, or a mapping with `name` and the options of that extension."""

    kind: str

    def checked(self, choice: Any) -> Any:
        """The choice, if its name is known; ValueError otherwise."""
        name = choice.get("name") if isinstance(choice, Mapping) else choice
        if not isinstance(name, str):
            raise ValueError("expected a name, or a group of fields with `name` and the options of what it names")
        if not registry.knows(self.kind, name):
            raise ValueError(registry.unknown(self.kind, name))
        return choice


class MethodOptions(Section):
    """The continual-learning method, and what is learned per task."""

    TRAINING_ONLY: ClassVar[frozenset[str]] = frozenset()  # options without effect once a module is learned
    # Former defaults, by the options that runs and adapters lack which are older than these options.
    FORMERLY: ClassVar[Mapping[str, Any]] = {}

    name: Annotated[str, FromRegistry("methods")] = Field(DEFAULT, description="the continual-learning method")

    @classmethod
    def training_only(cls) -> frozenset[str]:
        """The options without effect once a module is learned: `TRAINING_ONLY` of it and of its base classes."""
        return frozenset[str]().union(*(vars(base).get("TRAINING_ONLY", ()) for base in cls.__mro__))

    @property
    def keeps_answer_heads(self) -> bool:
        """Whether each task keeps an answer head beside its module."""
        return getattr(self, "answer_head", "none") != "none"

    def after(self, stages: int) -> MethodOptions:
        """The method as it was after this number of stages; differs from the present one if it was changed since."""
        return self

    def changed(self, changes: Mapping[str, Any], stages: int) -> MethodOptions:
        """The method with another `gate` or `share` for the stages after the first `stages`; UserError without one."""
        if changes:
            name = next(iter(changes))
            raise UserError(f"the method {self.name} has no {name}; expected one that selects by similarity.")
        return self

    @classmethod
    def variants(cls) -> Mapping[str, type[Section]]:
        """The options of every method by its name, for messages, completion and the documentation.

        Without methods that cannot be imported: that is said to those who name them.
        """
        found = {}
        for name in registry.names("methods"):
            with contextlib.suppress(UserError):
                found[name] = options_of(name)
        return found


RULE, ROUTER, PART = FromRegistry("rules"), FromRegistry("routers"), FromRegistry("parts")
RuleChoice = Annotated[str | dict[str, Any], PlainValidator(RULE.checked), RULE]
RouterChoice = Annotated[str | dict[str, Any], PlainValidator(ROUTER.checked), ROUTER]
PartChoice = Annotated[str | dict[str, Any], PlainValidator(PART.checked), PART]


class RoutedOptions(MethodOptions):
    """What methods have in common that find the task of a sample by routing."""

    TRAINING_ONLY = frozenset({"keys_per_task", "answer_head"})

    unfamiliar: Unfamiliar = Field(
        "answer",
        description="a question that resembles no task (it is farther from the training samples of the task that fits "
        "best than 99 in 100 of these are). answer: as any other; zero_shot: by the frozen model alone; flag: as any "
        "other, and marked",
    )
    keys_per_task: int = Field(
        128,
        ge=1,
        description="samples of a task whose routing keys are kept, where router, share or unfamiliar need any",
    )
    answer_head: Literal["none", "ridge"] = Field(
        "none",
        description="ridge: a task also keeps a linear classifier of its recurring answers by a sample's routing keys, "
        "whose probabilities multiply the decoder's at every token (docs/methods.md)",
    )


def choice_name(choice: Choice) -> str:
    """The name in a choice."""
    return choice if isinstance(choice, str) else str(choice["name"])


def chosen_options(kind: str, options: type[Section], choice: Choice, method: Section | None) -> Section:
    """The options of a chosen router, rule, part or term: those in the choice, and the method's of the same names.

    Raises UserError for an option that what is chosen does not have, and for an invalid value.

    Args:
        kind: "routers", "rules", "parts" or "terms".
        options: the options' class.
        choice: the name, or a mapping with `name` and options.
        method: options of the method; None: only those in the choice.
    """
    own = {} if isinstance(choice, str) else {name: value for name, value in choice.items() if name != "name"}
    shared = {} if method is None else {n: getattr(method, n) for n in options.model_fields if hasattr(method, n)}
    word, name = registry.WORDS[kind], choice_name(choice)
    for option in own:
        if option not in options.model_fields:
            known = list(options.model_fields)
            raise UserError(
                f"The {word} {name} has no option '{option}'; it has {', '.join(known) or 'none'}."
                + nearest(option, known)
            )
    try:
        return options.model_validate({**shared, **own})
    except ValidationError as error:
        raise UserError(f"The {word} {name} cannot take its options: {sentence(error, options)}") from None


def options_of(name: str) -> type[MethodOptions]:
    """The class of a method's options; UserError for an unknown method."""
    options: type[MethodOptions] = registry.load("methods", name).Options
    return options


def method_options(fields: Mapping[str, Any] | None = None, /, **more: Any) -> MethodOptions:
    """The options of the method `name`; pydantic's ValidationError for options that this method does not have."""
    given = {**(fields or {}), **more}
    if given.keys() >= set(ONCE_OF_ALL):  # only a resolved recipe of an earlier version has all of them
        given = of_a_record(given)
    name = given.get("name", DEFAULT)
    if not isinstance(name, str):
        return MethodOptions.model_validate({"name": name})
    if not registry.knows("methods", name):
        raise _wrong({"name": registry.unknown("methods", name)}, given)
    try:
        options = options_of(name)
    except UserError as error:
        raise _wrong({"name": str(error)}, given) from None
    foreign = [str(option) for option in given if option not in options.model_fields]
    if foreign:
        raise _wrong({option: _no_option(name, option, options) for option in foreign}, given)
    return options.model_validate({**given, "name": name})


def validated(value: Any, handler: ValidatorFunctionWrapHandler) -> MethodOptions:
    """Validates the field `method` of a recipe into the class of the named method's options."""
    if isinstance(value, MethodOptions):
        return value
    if not isinstance(value, Mapping):
        handler(value)  # raises pydantic's error
    return method_options(value)


def _wrong(sentences: Mapping[str, str], given: Mapping[str, Any]) -> ValidationError:
    """pydantic's ValidationError with these messages by field."""
    details: list[InitErrorDetails] = [
        {"type": "value_error", "loc": (field,), "input": given.get(field), "ctx": {"error": ValueError(text)}}
        for field, text in sentences.items()
    ]
    return ValidationError.from_exception_data("method", details)


# The field of a recipe.
MethodField = Annotated[SerializeAsAny[MethodOptions], WrapValidator(validated)]


def of_a_record(fields: Any) -> Any:
    """The section `method` of a run or adapter of any version, as this version says the same.

    Without fields of no effect, which all methods once had, and with the former defaults of fields that it lacks.
    """
    if not isinstance(fields, Mapping) or not registry.knows("methods", str(fields.get("name", DEFAULT))):
        return fields
    options = options_of(str(fields.get("name", DEFAULT)))
    kept = {name: value for name, value in fields.items() if name in options.model_fields or name not in ONCE_OF_ALL}
    return {**options.FORMERLY, **kept}


def require_registered(place: Path, fields: Any) -> None:
    """Raise UserError unless the `method` of a file from elsewhere names only what is registered here.

    A recipe is the user's own and may name a target, which is imported. An adapter may come from somebody else, and
    nothing is imported because it says so; `place` is that file.
    """
    if not isinstance(fields, Mapping):
        return
    known = {name for kind in registry.BUILT_IN for name in registry.names(kind)}
    for text in _texts(fields):
        if registry.is_target(text) and text not in known:
            raise UserError(
                f"{place} names '{text}', which would be imported. An adapter may come from somebody else, so it is "
                "taken only if you have registered it: call pipeline.config.registry.register(KIND, "
                f"'{text}', '{text}') before, if you trust that module."
            )
    name = str(fields.get("name", DEFAULT))
    if not registry.knows("methods", name):
        raise UserError(f"{place} needs the method '{name}'; {registry.provide('methods', name)}")
    for field, info in options_of(name).model_fields.items():
        mark = next((mark for mark in info.metadata if isinstance(mark, FromRegistry)), None)
        choice = fields.get(field)
        named = choice.get("name") if isinstance(choice, Mapping) else choice
        if mark is not None and isinstance(named, str) and not registry.knows(mark.kind, named):
            word = registry.WORDS[mark.kind]
            raise UserError(f"{place} needs the {word} '{named}'; {registry.provide(mark.kind, named)}")


def _texts(content: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from _texts(value)


def _no_option(name: str, option: str, options: type[MethodOptions]) -> str:
    """The error message for an option that the method does not have: its options, and methods that have this one."""
    known = [field for field in options.model_fields if field != "name"]
    others = [other for other, has in MethodOptions.variants().items() if option in has.model_fields]
    hint = f" It is an option of {', '.join(others)}." if others else nearest(option, known)
    return f"the method {name} has no option '{option}'; it has {', '.join(known) or 'none'}.{hint}"
