"""`mpq schema`: the JSON schema of the policy file, for editors."""

from __future__ import annotations

import json

import click

from mpq.keys import schema as policy_schema


@click.command()
def schema() -> None:
    """Print the JSON schema of policy.yaml, by which editors complete and check it.

    `mpq analyze` writes it beside the policy, whose first line names it. In a policy
    of your own, name it so:

    \b
    mpq schema > policy.schema.json
    # yaml-language-server: $schema=policy.schema.json
    """
    click.echo(json.dumps(policy_schema(), indent=1))
