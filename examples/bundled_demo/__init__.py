"""Train, verify, serve and score a small bundled teacher and student: `make demo`."""
