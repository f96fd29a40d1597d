"""An item of a list that is a bare name has no fields, and the error says how to give it some."""

import pytest

from pipeline.config.yaml_file import apply_overrides
from pipeline.errors import UserError


def test_a_field_of_a_bare_name_is_refused_with_what_to_write() -> None:
    with pytest.raises(UserError, match=r"'Boxes' is a bare name in the recipe.*Write `- name: Boxes`"):
        apply_overrides({"data": {"tasks": ["Colours", "Boxes"]}}, ["data.tasks.Boxes.limit_test=30"])
