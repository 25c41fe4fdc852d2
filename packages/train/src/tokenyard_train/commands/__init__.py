"""The functions behind the subcommands."""
