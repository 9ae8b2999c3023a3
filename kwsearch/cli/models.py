"""kwsearch models: what `budget` and recipes know by name."""

from __future__ import annotations

import click


@click.command("models")
@click.argument("pattern", required=False, metavar="[timm:PART|torchvision:PART]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(pattern: str | None, as_json: bool) -> None:
    """List the models of the zoo, their inputs and their published ratios.

    Or names of timm and torchvision: those that have PART in them, which may be a glob.

    \b
    kwsearch models timm:resnext
    kwsearch models 'torchvision:efficientnet_v2_*'
    """
    if pattern is None:
        _print_zoo(as_json)
        return
    from kwsearch.networks import matching

    names = matching(pattern)
    if as_json:
        import json

        click.echo(json.dumps(names, indent=2))
        return
    for name in names:
        click.echo(name)
    if not names:
        raise click.ClickException(f"{pattern}: there is none of that name")


def _print_zoo(as_json: bool) -> None:
    from kwsearch import published, zoo

    if as_json:
        import json

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
        click.echo(json.dumps(entries, indent=2))
        return
    widest = max(map(len, zoo.MODELS))
    for model in zoo.MODELS.values():
        size = "x".join(map(str, model.input_size))
        ratios = ", ".join(published.fraction(e.ratio) for e in published.of_model(model.name))
        note = f"; published at {ratios}" if ratios else ""
        name, classes = model.name.ljust(widest), f"{model.num_classes:>5} classes"
        click.echo(f"{name} {size:<13} {classes}  {model.summary}{note}")
    click.echo("timm:NAME and torchvision:NAME build theirs (`kwsearch models timm:resnext` lists")
    click.echo("names), package.module:function with --trust your own.")
