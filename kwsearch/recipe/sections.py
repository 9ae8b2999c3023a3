"""What all sections of a recipe are."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """Its keys are known, its values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def section_error(message: str) -> PydanticCustomError:
    """A problem of the section that the validated field is in, not of the field."""
    return PydanticCustomError("section", "{message}", {"message": message})
