"""Run `tokenyard data spark`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from rich.console import Console

from tokenyard import ConfigError
from tokenyard.units import describe_bytes
from tokenyard_cli.console import print_line
from tokenyard_train.commands.data import parse_tokenizer
from tokenyard_train.commands.options import SparkPackOptions
from tokenyard_train.data.paths import DELTA_LOG
from tokenyard_train.data.spark.driver import pack, reason_of
from tokenyard_train.optional import require


def run_spark(console: Console, options: SparkPackOptions) -> None:
    """Pack a table in the running Spark session, or in a new one. Raises TokenyardError."""
    sql = require("pyspark.sql", "tokenyard data spark", "tokenyard-train[spark]")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    tokenizer = parse_tokenizer(options.tokenizer, options.eos_token)
    _refuse_files_of_a_table(options)
    start = time.monotonic()
    try:
        session = sql.SparkSession.builder.appName("tokenyard data spark").getOrCreate()
    except Exception as error:  # errors come from Spark and from a missing JVM
        raise ConfigError(f"Spark cannot be started: {reason_of(error)}") from None
    try:
        if options.format is None:
            rows = session.table(options.source)
        else:
            rows = session.read.format(options.format).load(options.source)
    except Exception as error:
        reason = reason_of(error)
        if options.format is None and Path(options.source).exists():
            reason += "; for a path, give --format, such as --format parquet"
        raise ConfigError(f"SOURCE {options.source!r} cannot be read: {reason}") from None
    done = pack(
        rows,
        options.out,
        options.order,
        text_key=options.text_key,
        tokenizer=tokenizer,
        source=options.source,
        overwrite=options.overwrite,
    )
    seconds = time.monotonic() - start
    print_line(
        console,
        f"{options.out}: {done.documents:,} documents, {done.tokens:,} tokens "
        f"of {describe_bytes(done.text_bytes)} of text in {seconds:.1f} s",
    )


def _refuse_files_of_a_table(options: SparkPackOptions) -> None:
    """Raise ConfigError for a Delta table that another format would read without its log."""
    if options.format in (None, "delta") or not Path(options.source, DELTA_LOG).is_dir():
        return
    raise ConfigError(
        f"--format is {options.format!r} and SOURCE {options.source!r} is a Delta table, whose "
        "files have deleted and overwritten rows too; give --format delta to a Spark with Delta, "
        "or use tokenyard data pack --delta"
    )
