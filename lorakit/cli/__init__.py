"""The command line: commands, `init`, listings and the version."""
