"""`paddlewheel version` and `paddlewheel schema`: what this installation is and understands."""

from __future__ import annotations

import platform
import sys

import click

import paddlewheel
from paddlewheel.cli.options import OutputFormat, output_option


@click.command()
@output_option
def version(output: OutputFormat) -> None:
    """Print the version of Paddlewheel and of the Python that runs it."""
    if output == "json":
        from paddlewheel.cli.output import print_json

        print_json({"version": paddlewheel.__version__, "python": platform.python_version()})
    else:
        click.echo(f"paddlewheel {paddlewheel.__version__} (Python {platform.python_version()})")


@click.command()
@click.argument("kind", type=click.Choice(["model", "pipeline", "gateway"]), default="model")
@output_option
def schema(kind: str, output: OutputFormat) -> None:
    """Print the JSON Schema of a KIND of document (model unless given), for editors and CI.

    \b
    In VS Code's YAML extension:
      paddlewheel schema > paddlewheel.schema.json
      # yaml-language-server: $schema=./paddlewheel.schema.json   (first line of a document)
    """
    del output  # JSON either way; taken so that every reading command takes the flag
    from paddlewheel.cli.output import print_json
    from registry.schema import gateway_schema, model_schema, pipeline_schema

    made = {"model": model_schema, "pipeline": pipeline_schema, "gateway": gateway_schema}
    print_json(made[kind]())
    sys.stdout.flush()
