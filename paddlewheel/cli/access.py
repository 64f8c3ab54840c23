"""`paddlewheel access`: keys for the gateway document."""

from __future__ import annotations

import secrets

import click

from paddlewheel.cli.options import OutputFormat, output_option


@click.group()
def access() -> None:
    """Make API keys for the gateway document (see docs/access.md)."""


@access.command("new-key")
@click.option("--id", "client", required=True, metavar="ID", help="Whose key it is.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME",
    help="A model that it is good for, '*' for all; may be given again.",
)  # fmt: skip
@click.option("--admin", is_flag=True, help="Good for /admin and /metrics too.")
@output_option
def new_key(client: str, models: tuple[str, ...], admin: bool, output: OutputFormat) -> None:
    """Make a random key; print it, once, and its entry for spec.access.api_keys.

    Only the entry, which has the key's digest, belongs into the document.
    """
    from pydantic import ValidationError

    from paddlewheel.cli.output import print_json, say
    from registry.gateway_spec import ApiKey
    from router.access.api_keys import SECRET_BYTES, digest_of, show_key

    key = show_key(secrets.token_bytes(SECRET_BYTES))
    written = {"id": client, "sha256": digest_of(key), "models": list(models), "admin": admin}
    try:
        entry = ApiKey.model_validate(written).model_dump(mode="json")
    except ValidationError as exc:
        field = exc.errors()[0]["loc"][0]
        raise click.UsageError(
            "--model: want a model's name, or '*'"
            if field == "models"
            else "--id: want letters, digits, '.', '_', '@' and '-'"
        ) from exc
    if output == "json":
        print_json({"key": key, "entry": entry})
        return
    say("Kept nowhere; give it to the client now:")
    click.echo(key)
    say("For spec.access.api_keys:")
    shown = '"*"' if entry["models"] == "*" else f"[{', '.join(entry['models'])}]"
    extra = ", admin: true" if admin else ""
    click.echo(f'- {{id: {client}, sha256: "{entry["sha256"]}", models: {shown}{extra}}}')
