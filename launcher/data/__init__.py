"""Data files: reading them in any format, checking their rows, measuring their lengths."""
