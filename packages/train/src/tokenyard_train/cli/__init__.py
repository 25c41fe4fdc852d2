"""The subcommands of `tokenyard` that this package provides."""
