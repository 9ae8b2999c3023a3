"""`kwsearch schema`: the JSON Schema of recipes, for editors."""

from __future__ import annotations

import click


@click.command("schema")
def command() -> None:
    """Print the JSON Schema of recipe files."""
    import json

    from kwsearch.recipe import json_schema

    click.echo(json.dumps(json_schema(), indent=2))
