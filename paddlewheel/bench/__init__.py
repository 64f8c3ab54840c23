"""The figures we publish, measured by commands that anyone can run."""
