"""Data files: what is in them, what is wrong with them, and the rows that training gets."""
