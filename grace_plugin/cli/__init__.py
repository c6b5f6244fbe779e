"""The command line: `optimum-cli grace ...` and `grace ...`."""
