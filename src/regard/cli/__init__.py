"""The command-line tool: parse, call, print."""
