"""Resolve a table of Unity Catalog to its storage, by the official client.

The server and the token come from the environment, and so never from a config, which is saved.
"""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from pydantic import ValidationError

from tokenyard import ConfigError
from tokenyard_train.data.paths import UNITY_CATALOG
from tokenyard_train.hide_secrets import hide_secrets
from tokenyard_train.optional import require

_SERVERS = ("UNITY_CATALOG_URL", "DATABRICKS_HOST")
_TOKENS = ("UNITY_CATALOG_TOKEN", "DATABRICKS_TOKEN")
_API = "/api/2.1/unity-catalog"
_SECONDS = 30.0  # in which the server must answer

_REFUSALS = {
    401: "the server refuses the token, which may have expired; set {token} to a new one",
    403: "the user of {token} has no permission to read it; ask its owner for SELECT, "
    "and on Databricks for EXTERNAL USE SCHEMA",
    404: "the catalog has no such table; give catalog.schema.table",
}


class Storage(NamedTuple):
    """Where a table is, and deltalake's options to read it."""

    location: str
    options: dict[str, str]  # may hold short-lived credentials

    def __repr__(self) -> str:
        return f"Storage({self.location!r})"


class _NoTableError(Exception):
    """The server answered with nothing."""


def resolve(uri: str, key: str) -> Storage:
    """Return the storage of a table ``uc://catalog.schema.table``.

    Raises ConfigError, which names `key` and never a token, if the server does not give it.
    """
    client = require("unitycatalog.client", key, "tokenyard-train[unity-catalog]")
    server = _first(_SERVERS)
    if server is None:
        raise ConfigError(f"{key} {uri!r} needs a server; set {' or '.join(_SERVERS)}")
    token = _first(_TOKENS)
    address = server if "://" in server else f"https://{server}"
    host = address.rstrip("/").removesuffix(_API) + _API
    request = _request(client, host, token, uri.removeprefix(UNITY_CATALOG))
    try:
        # a thread of its own, because notebooks run an event loop in this one
        with ThreadPoolExecutor(1) as thread:
            table, credentials = thread.submit(asyncio.run, request).result()
    except client.ApiException as error:
        raise ConfigError(f"{key} {uri!r}: {_refusal(error)}") from None
    except (ValidationError, _NoTableError) as error:
        reason = hide_secrets(" ".join(str(error).split()))[:200]
        raise ConfigError(
            f"{key} {uri!r}: {hide_secrets(server)} gives no description of a table that "
            f"unitycatalog-client understands: {reason}"
        ) from None
    except Exception as error:  # errors come from aiohttp and from the client
        reason = hide_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
        raise ConfigError(
            f"{key} {uri!r}: {hide_secrets(server)} does not answer: {reason}"
        ) from None
    _check(table, f"{key} {uri!r}")
    options = {} if credentials is None else _options(credentials, f"{key} {uri!r}")
    return Storage(table.storage_location, options)


async def _request(client: Any, host: str, token: str | None, name: str) -> tuple[Any, Any]:
    """Return a table's description, and credentials for cloud storage, else None."""
    configuration = client.Configuration(host=host, access_token=token)
    async with client.ApiClient(configuration) as api:
        if token is not None:
            api.default_headers["Authorization"] = f"Bearer {token}"
        table = await client.TablesApi(api).get_table(name, _request_timeout=_SECONDS)
        if table is None:
            raise _NoTableError("the answer is empty")
        if _is_local(table.storage_location or "/"):
            return table, None
        wanted = client.GenerateTemporaryTableCredential(table_id=table.table_id, operation="READ")
        credentials = client.TemporaryCredentialsApi(api)
        return table, await credentials.generate_temporary_table_credentials(
            generate_temporary_table_credential=wanted, _request_timeout=_SECONDS
        )


def _check(table: Any, name: str) -> None:
    """Raise ConfigError for a view, and for a table of another format."""
    if not table.storage_location:
        raise ConfigError(f"{name} has no storage, as a view has none; give a table")
    kind = getattr(table.data_source_format, "value", table.data_source_format)
    if kind != "DELTA":
        raise ConfigError(f"{name} has the format {kind}, and only Delta tables are read")


def _options(credentials: Any, name: str) -> dict[str, str]:
    """Return temporary credentials as deltalake's options. Raises ConfigError if there are none."""
    aws = credentials.aws_temp_credentials
    azure = credentials.azure_user_delegation_sas
    if aws is not None:
        options = {
            "AWS_ACCESS_KEY_ID": aws.access_key_id,
            "AWS_SECRET_ACCESS_KEY": aws.secret_access_key,
            "AWS_SESSION_TOKEN": aws.session_token,
        }
        return {key: value for key, value in options.items() if value}
    if azure is not None:
        return {"AZURE_STORAGE_SAS_TOKEN": azure.sas_token}
    raise ConfigError(
        f"{name} is in a storage for which the catalog gives no credentials of S3 or Azure, and "
        "others are not supported"
    )


def _refusal(error: Any) -> str:
    """Return the rest of a sentence about a server's refusal."""
    variable = next((name for name in _TOKENS if os.environ.get(name)), _TOKENS[0])
    if error.status in _REFUSALS:
        return _REFUSALS[error.status].format(token=variable)
    text = re.sub(r"\s+", " ", str(error.body or error.reason))
    return f"the server answers {error.status}: {hide_secrets(text)[:200]}"


def _is_local(location: str) -> bool:
    return location.startswith(("file:", "/"))


def _first(names: tuple[str, ...]) -> str | None:
    values = (os.environ.get(name, "").strip() for name in names)
    return next(filter(None, values), None)
