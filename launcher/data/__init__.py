"""Reading a data file: its format, its problems, and how long its rows are in tokens."""
