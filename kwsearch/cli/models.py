"""kwsearch models: what `budget` and recipes know by name."""

from __future__ import annotations

import click


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the models of the zoo, their inputs and their published ratios."""
    from kwsearch import published, zoo

    entries = [
        {
            "name": model.name,
            "input": list(model.input_size),
            "classes": model.num_classes,
            "summary": model.summary,
            "published_ratios": [entry.ratio for entry in published.of_model(model.name)],
        }
        for model in zoo.MODELS.values()
    ]
    if as_json:
        import json

        click.echo(json.dumps(entries, indent=2))
        return
    for model in zoo.MODELS.values():
        size = "x".join(map(str, model.input_size))
        ratios = ", ".join(published.fraction(e.ratio) for e in published.of_model(model.name))
        note = f"; published at {ratios}" if ratios else ""
        click.echo(
            f"{model.name:<16} {size:<10} {model.num_classes:>5} classes  {model.summary}{note}"
        )
