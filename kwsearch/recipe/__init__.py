"""Recipes: the YAML file around a plan. The schema; every problem in one message; writing."""

from __future__ import annotations

from kwsearch.recipe.loading import RecipeError, load_recipe, parse_recipe
from kwsearch.recipe.micronas import MicroNAS, Supernet
from kwsearch.recipe.schema import (
    Budget,
    Method,
    ModelChoice,
    Proxy,
    Recipe,
    RecipeGroup,
    RecipePlan,
    Search,
    Space,
    Training,
    json_schema,
    section_of,
)
from kwsearch.recipe.writing import dump_recipe, write_recipe

__all__ = [
    "Budget",
    "Method",
    "MicroNAS",
    "ModelChoice",
    "Proxy",
    "Recipe",
    "RecipeError",
    "RecipeGroup",
    "RecipePlan",
    "Search",
    "Space",
    "Supernet",
    "Training",
    "dump_recipe",
    "json_schema",
    "load_recipe",
    "parse_recipe",
    "section_of",
    "write_recipe",
]
